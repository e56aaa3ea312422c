"""Writes docs/models.md: which published pipelines, VAEs and ControlNets the scripts train, by the tests in tests/real.

    python tests/models_page.py

Expect about five minutes on one core. Runs the tests; writes nothing if one of them fails.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "models.md"
sys.path[:0] = [str(HERE), str(HERE / "mindtune" / "models")]

from real.verdicts import CONTROLNETS, FILES, OWNERS, PIPELINES, VAES, Verdict

SCRIPTS = {
    "flux_lora": "[LoRA](flux_lora.md)",
    "flux_controlnet": "[ControlNet](flux_controlnet.md)",
    "sd": "[ControlNet](controlnet.md)",
    "sdxl": "[ControlNet, XL](controlnet.md)",
    "flux_kontext": "[Kontext](flux_kontext.md)",
    "flux_control": "[Control-LoRA](flux_control.md)",
    "flux_fill": "[Control-LoRA with --fill](flux_control.md)",
}
TEXT = """# Supported models

`python tests/models_page.py` writes this page. It makes a small copy of each model with random weights.
File names, config keys and tensor names are the published ones; no published weights are loaded.

- **trained**: the test trains the model for one update, generates an image, and resumes the run.
- **refused**: the script refuses the model before anything is encoded or written. The message names the
  model, the key and its value.

A pipeline that edits images, follows a condition or fills masks is trained by the script for this; the
LoRA script refuses it, with a message that names the other script. [Kontext](flux_kontext.md) and
[Control-LoRA](flux_control.md) also take text-to-image models of FLUX.1.

Where a published file was not available, `tests/real_configs.py` says what is used instead. Names
without an owner exist in several repositories. [Hubs](hub.md) says where models are downloaded from.

## Pipelines

{pipelines}
## VAEs

For SDXL use `--pretrained_vae_model_name_or_path`. For Stable Diffusion 1 and 2 put the files into the
pipeline's `vae` directory.

{vaes}
## ControlNets to train further

With `--controlnet_model_name_or_path`.

{controlnets}
## Files

{files}{adapters}"""
ADAPTERS = """
## LoRAs of other tools

{rows}"""


def owned(name: str) -> str:
    """The name with its owner on the hub, if there is one."""
    found = [owner for owner, names in OWNERS.items() if name in names]
    return f"{found[0]}/{name}" if found else name


def verdict_row(name: str, verdict: Verdict) -> tuple[str, str, str]:
    """Name, what the scripts do with the model, remark."""
    if not verdict.scripts:
        return owned(name), "refused", verdict.why
    return owned(name), "trained: " + ", ".join(SCRIPTS[script] for script in verdict.scripts), verdict.why


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, ("---",) * len(head), *rows))


def adapter_rows() -> list[tuple[str, str, str]]:
    """Tool, an entry of its file, and "read" or the error message, from the tests of LoRA layouts."""
    import test_lora_layouts

    rows = getattr(test_lora_layouts, "adapter_rows", list)()
    return [
        (tool, f"`{entry}`" if entry else "", " ".join(verdict.replace("|", "\\|").split()))
        for tool, entry, verdict in rows
    ]


def page() -> str:
    """The text of the page, from the tables that the tests check."""
    tables = {}
    for part, title, verdicts in (
        ("pipelines", "pipeline", PIPELINES),
        ("vaes", "VAE", VAES),
        ("controlnets", "ControlNet", CONTROLNETS),
    ):
        rows = [verdict_row(name, verdict) for name, verdict in verdicts.items()]
        tables[part] = table((title, "what happens", "remark"), rows)
    files = table(("files", "what happens"), [(what, how) for what, (how, _) in FILES.items()])
    adapters = adapter_rows()
    loras = ""
    if adapters:
        loras = ADAPTERS.format(rows=table(("tool or kind", "an entry of its file", "read, or the message"), adapters))
    return TEXT.format(files=files, adapters=loras, **tables)


def main() -> int:
    import pytest

    code = pytest.main([str(HERE / "real"), "-q", "-n", "0", "--ignore", str(HERE / "real/test_page.py")])
    if code:
        print("docs/models.md is not written: a model is not trained or refused as tests/real/verdicts.py says (above)")
        return int(code)
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
