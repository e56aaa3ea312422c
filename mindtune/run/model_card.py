"""The model card of a finished run: README.md, with the metadata that the hubs read.

Source of the metadata: huggingface.co/docs/hub/model-cards, and model-cards-components for the gallery.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple, Optional

from huggingface_hub.utils import yaml_dump

from mindtune.models import hubs
from mindtune.models.lora_files import LORA_FILE
from mindtune.models.lora_layouts import KINDS

MARK = "<!-- This card was written by MindTune; remove this line to keep your own changes. -->"
FLUX_DEV = {
    "license": "other",
    "license_name": "flux-1-dev-non-commercial-license",
    "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
}
# Known base models -> their licences. ModelScope has them under these names too, and copies of AI-ModelScope.
LICENCES = {
    "FLUX.1-schnell": {"license": "apache-2.0"},
    **{f"FLUX.1-{name}": FLUX_DEV for name in ("dev", "Krea-dev", "Kontext-dev", "Depth-dev", "Canny-dev", "Fill-dev")},
}
OWNERS = ("black-forest-labs", "AI-ModelScope")
OTHER_LICENCE = {"license": "other", "license_name": "as-the-base-model"}


class Kind(NamedTuple):
    """What was trained: its tags, its class and its pipeline in diffusers, and the script that uses it here.

    `inputs` are the arguments of the pipeline beside the prompt, `flags` those of the script, both with the example's
    files.
    """

    tags: tuple[str, ...]
    model: Optional[str]  # None: a LoRA
    pipeline: str
    inputs: tuple[str, ...]
    script: str
    flags: tuple[str, ...]
    precision: str
    name: str = ""  # what stands before LoRA in the name of the adapter
    task: str = "text-to-image"


LORA = Kind(("lora", "template:sd-lora", "flux"), None, "FluxPipeline", (), "flux_lora/infer_flux_lora.py", (), "bf16")
KONTEXT = LORA._replace(
    tags=(*LORA.tags, "flux-kontext"),
    pipeline="FluxKontextPipeline",
    inputs=('image=load_image("source.png")',),
    script="examples/flux_kontext/infer_flux_kontext.py",
    flags=("--image", "source.png"),
    task="image-to-image",
)
CONTROL = LORA._replace(
    tags=("lora", "control-lora", "flux"),
    pipeline="FluxControlPipeline",
    inputs=('control_image=load_image("condition.png")',),
    script="examples/flux_control/infer_control_lora_flux.py",
    flags=("--control_image", "condition.png"),
    name="Control-",
)
FILL = CONTROL._replace(
    pipeline="FluxFillPipeline",
    inputs=('image=load_image("source.png")', 'mask_image=load_image("mask.png")'),
    flags=("--fill", "--control_image", "source.png", "--mask_image", "mask.png"),
)
FLUX_CONTROLNET = Kind(
    ("controlnet", "flux"),
    "FluxControlNetModel",
    "FluxControlNetPipeline",
    ('control_image=load_image("condition.png")',),
    "flux_controlnet/infer_flux_controlnet.py",
    ("--control_image", "condition.png"),
    "bf16",
)
CONTROLNET = Kind(
    ("controlnet", "stable-diffusion"),
    "ControlNetModel",
    "StableDiffusionControlNetPipeline",
    ('image=load_image("condition.png")',),
    "examples/controlnet/infer_controlnet.py",
    ("--control_image", "condition.png"),
    "fp16",
)
CONTROLNET_XL = CONTROLNET._replace(
    tags=("controlnet", "stable-diffusion-xl"),
    pipeline="StableDiffusionXLControlNetPipeline",
    script="examples/controlnet/infer_controlnet_sdxl.py",
)


def model_card(output_dir: Path, repo_id: str, base_model: str, gallery: list[tuple[str, str]], hub: str) -> str:
    """The model card in Markdown: what was trained, images with their prompts, how to use it, and the flags.

    `gallery` has the prompt and the file of each image, relative to the output directory.
    """
    record = json.loads((output_dir / "run.json").read_text())
    kind = kind_of(output_dir)
    is_lora = kind.model is None
    adapter = record["flags"].get("adapter") or "lora"
    name = f"{kind.name}{KINDS[adapter][0]} adapter" if is_lora else "ControlNet"
    tags = [tag for tag in kind.tags if adapter == "lora" or tag not in ("lora", "template:sd-lora")]
    tags += [adapter] if is_lora and adapter != "lora" else []
    # A path is no id, which a hub would refuse as metadata, and says nothing to others.
    base_id = base_model if hubs.is_id(base_model) and not Path(base_model).is_dir() else None
    base = base_id or f"path/to/{Path(base_model).resolve().name}"
    instance_prompt = record["flags"].get("instance_prompt")
    metadata = {
        "base_model": base_id,
        "base_model_relation": "adapter" if base_id and is_lora else None,
        "instance_prompt": instance_prompt,
        "library_name": "diffusers",
        **_licence(base_id),
        "pipeline_tag": kind.task,
        "tags": [kind.task, "diffusers", *tags, "mindspore", "mindone"],
        "widget": [{"text": prompt, "output": {"url": file}} for prompt, file in gallery],
    }
    prompts = "".join(f"- {' '.join(prompt.split())}\n" for prompt, _ in gallery)
    has_grid = (output_dir / "samples" / "final.png").is_file()
    grid = "![Images of the last validation](samples/final.png)\n\n" if has_grid else ""
    images = f"\n<Gallery />\n\n{grid}{prompts}" if gallery else ""
    flags = {name: value for name, value in record["flags"].items() if value not in (None, False, "", [])}
    rows = "".join(f"| `--{name}` | {_code(value)} |\n" for name, value in flags.items())
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    prompt = instance_prompt or (gallery[0][0] if gallery else "a photo of a cat")
    return f"""---
{yaml_dump({name: value for name, value in metadata.items() if value}, sort_keys=False)}---
{MARK}

# {output_dir.resolve().name}

A {name} for `{base}`, trained with MindTune on MindSpore.
Its licence is that of the base model.
{images}
{_diffusers(kind, adapter, repo_id, base, prompt, hub)}
## Use with MindTune

```bash
{_commands(kind, repo_id, base, prompt, hub)}
```

## Flags

| flag | value |
| --- | --- |
{rows}
Seed {record["seed"]}, {record.get("updates", "?")} updates; {versions}.
"""


def kind_of(output_dir: Path) -> Kind:
    """What was trained: from the config of a ControlNet, and the system that run.json names, which older ones do not.

    A LoRA has no config.
    """
    path = output_dir / "config.json"
    if path.is_file():
        config = json.loads(path.read_text())
        if config["_class_name"] == FLUX_CONTROLNET.model:
            return FLUX_CONTROLNET
        return CONTROLNET_XL if config.get("addition_embed_type") == "text_time" else CONTROLNET
    record = json.loads((output_dir / "run.json").read_text())
    control = FILL if record["flags"].get("fill") else CONTROL
    kind = {"flux_kontext": KONTEXT, "flux_control": control}.get(record.get("system"), LORA)
    if kind is LORA:
        return LORA
    # Their pipelines, and the scripts, have other defaults than training.
    scale = str(record["flags"]["guidance_scale"])
    inputs, flags = (*kind.inputs, f"guidance_scale={scale}"), (*kind.flags, "--guidance_scale", scale)
    return kind._replace(inputs=inputs, flags=flags)


def _licence(base_id: Optional[str]) -> dict[str, str]:
    owner, _, name = (base_id or "").partition("/")
    return LICENCES.get(name, OTHER_LICENCE) if owner in OWNERS else OTHER_LICENCE


def _code(value: Any) -> str:
    """A value as code in a cell of a table."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    text = Path(text).name if text.startswith("/") else text  # the directories of a machine say nothing to others
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _diffusers(kind: Kind, adapter: str, repo_id: str, base: str, prompt: str, hub: str) -> str:
    """The section on diffusers, which cannot load a LoKr."""
    if adapter == "lokr":
        return f"`{LORA_FILE}` has LyCORIS' layout, which ComfyUI loads. diffusers does not.\n"
    return f"## Use with diffusers\n\n```python\n{_python(kind, repo_id, base, prompt, hub)}\n```\n"


def _python(kind: Kind, repo_id: str, base: str, prompt: str, hub: str) -> str:
    """The lines of Python that use the result with diffusers, which downloads ids from the Hugging Face hub only."""
    in_hub = 'snapshot_download("{}")' if hub == "modelscope" else '"{}"'
    result = in_hub.format(repo_id)
    base = f'"{base}"' if base.startswith("path/to/") else in_hub.format(base)
    text = json.dumps(prompt, ensure_ascii=False)
    dtype = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[kind.precision]
    imports = ["import torch", f"from diffusers import {', '.join(filter(None, (kind.model, kind.pipeline)))}"]
    if kind.inputs:
        imports.append("from diffusers.utils import load_image")
    if kind.model is None:
        lines = [
            f'pipe = {kind.pipeline}.from_pretrained({base}, torch_dtype={dtype}).to("cuda")',
            f'pipe.load_lora_weights({result}, weight_name="{LORA_FILE}")',
        ]
    else:
        lines = [
            f"controlnet = {kind.model}.from_pretrained({result}, torch_dtype={dtype})",
            f"pipe = {kind.pipeline}.from_pretrained({base}, controlnet=controlnet, torch_dtype={dtype})",
            'pipe.to("cuda")',
        ]
    arguments = [f"prompt={text}", *kind.inputs]  # FLUX.1-Kontext's pipeline takes the image first
    lines.append(f"image = pipe({', '.join(arguments)}).images[0]")
    if hub == "modelscope":
        imports.append("from modelscope import snapshot_download")
    return "\n".join([*imports, "", *lines, 'image.save("image.png")'])


def _commands(kind: Kind, repo_id: str, base: str, prompt: str, hub: str) -> str:
    """The commands that use the result with this repository's script."""
    words = ["python", kind.script, "--pretrained_model_name_or_path", base]
    first = []
    if kind.model is None:
        folder = repo_id.split("/")[1]
        first = [shlex.join(hubs.HUBS[hub].download_command(repo_id, folder))]
        words += ["--lora", folder]
    else:
        words += ["--controlnet", repo_id]
    words += [*kind.flags, "--prompt", " ".join(prompt.split()), "--mixed_precision", kind.precision]
    words += [] if hub == hubs.DEFAULT else ["--hub", hub]
    return "\n".join([*first, shlex.join(words)])
