"""python -m mindtune.plan: the plan of a script, from its flags."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

from mindtune import plan
from mindtune.cli import UserError


@pytest.mark.slow
def test_the_command_prints_what_dry_run_prints(tiny_flux, lora_script, capsys):
    flags = ["--pretrained_model_name_or_path", str(tiny_flux), "--instance_data_dir", "x", "--instance_prompt", "y"]
    lora_script.main([*flags, "--dry_run"])
    expected = capsys.readouterr().out
    script = ROOT / "flux_lora" / "train_dreambooth_lora_flux.py"
    done = subprocess.run(
        [sys.executable, "-m", "mindtune.plan", "--script", script, *flags], capture_output=True, text=True
    )
    # Other processes write to the disk meanwhile.
    found, expected = (re.sub(r"(free in .*:) .*", r"\1", text) for text in (done.stdout, expected))
    assert (done.returncode, found) == (0, expected), done.stderr
    assert "activations, kept (this run)" in expected


def test_a_missing_script_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan.py", "--script", "nowhere.py"])
    with pytest.raises(UserError, match="--script PATH"):
        plan.main()
