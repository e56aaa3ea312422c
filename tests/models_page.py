"""Write docs/models.md: which published pipelines, VAEs and ControlNets the scripts train, as the tests of tests/real show it.

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
    "flux_lora": "[LoRA](flux_lora.md)", "flux_controlnet": "[ControlNet](flux_controlnet.md)", "sd": "[ControlNet](controlnet.md)",
    "sdxl": "[ControlNet, XL](controlnet.md)",
}  # fmt: skip
TEXT = """# Which published models are trained

Written by `python tests/models_page.py`. It makes a small copy of each model with random weights: file names, config keys and tensor
names are the published ones. A supported model is trained for an update, drawn with, and resumed. An unsupported one has to be refused
before anything is encoded or written, with a message that names the model, the key and its value. No published weights are loaded.
Where a published file was not at hand, `tests/real_configs.py` says what stands in for it. Names without an owner were found in more
than one place.

## Pipelines

{pipelines}
## VAEs

For SDXL give them by `--pretrained_vae_model_name_or_path`; for Stable Diffusion 1 and 2 put them into the pipeline's `vae` folder.

{vaes}
## ControlNets to go on from

By `--controlnet_model_name_or_path`.

{controlnets}
## Files

{files}{adapters}"""
ADAPTERS = """
## LoRAs of other tools

{rows}"""


def owned(name: str) -> str:
    """The name on the hub, where there is one."""
    found = [owner for owner, names in OWNERS.items() if name in names]
    return f"{found[0]}/{name}" if found else name


def verdict_row(name: str, verdict: Verdict) -> tuple[str, str, str]:
    if not verdict.scripts:
        return owned(name), "refused", verdict.why
    return owned(name), "trained: " + ", ".join(SCRIPTS[script] for script in verdict.scripts), verdict.why


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, ("---",) * len(head), *rows))


def adapter_rows() -> list[tuple[str, str, str]]:
    """Tool, an entry of its file, and "read" or why not: of the tests of LoRA layouts, where they give them."""
    import test_lora_layouts

    rows = getattr(test_lora_layouts, "adapter_rows", list)()
    return [
        (tool, f"`{entry}`" if entry else "", " ".join(verdict.replace("|", "\\|").split()))
        for tool, entry, verdict in rows
    ]


def page() -> str:
    """The page by the tables that the tests hold the scripts to."""
    tables = {
        part: table((title, "what happens", "remark"), [verdict_row(name, verdict) for name, verdict in verdicts.items()])
        for part, title, verdicts in (
            ("pipelines", "pipeline", PIPELINES), ("vaes", "VAE", VAES), ("controlnets", "ControlNet", CONTROLNETS)
        )
    }  # fmt: skip
    adapters = adapter_rows()
    files = table(("files", "what happens"), [(what, how) for what, (how, _) in FILES.items()])
    rows = (
        ADAPTERS.format(rows=table(("tool or kind", "an entry of its file", "read, or the message"), adapters))
        if adapters
        else ""
    )
    return TEXT.format(files=files, adapters=rows, **tables)


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
