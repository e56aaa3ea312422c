"""The PyTorch side of the interchange check: loads the files of our scripts and writes files for them.

    python interchange_reference.py WORK

Reads WORK/<kind>/ours, settings.json, noise.npy and condition.png; writes WORK/<kind>/theirs and WORK/found.npz.
"""

import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import peft
import reference
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

LORA_FILE = "pytorch_lora_weights.safetensors"


def changed(model, scale=0.02):
    """The model with a random change of every trainable parameter, as after some training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def new_controlnet(root, kind):
    """A ControlNet that diffusers initializes from the model of the pipeline."""
    if kind != "flux_controlnet":
        return diffusers.ControlNetModel.from_unet(diffusers.UNet2DConditionModel.from_pretrained(root / "unet"))
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(root / "transformer")
    heads = {name: transformer.config[name] for name in ("attention_head_dim", "num_attention_heads")}
    return diffusers.FluxControlNetModel.from_transformer(transformer, num_layers=1, num_single_layers=1, **heads)


def check_controlnet(folder, settings):
    """The images of our ControlNet and of one of diffusers, and the number of missing or unexpected keys of ours."""
    kind = settings["kind"]
    root = Path(settings["root"])
    cls = diffusers.FluxControlNetModel if kind == "flux_controlnet" else diffusers.ControlNetModel
    ours, info = cls.from_pretrained(folder / "ours", output_loading_info=True)
    theirs = changed(new_controlnet(root, kind))
    theirs.save_pretrained(folder / "theirs")
    generate = reference.generate_flux_controlnet if kind == "flux_controlnet" else reference.generate_unet
    given = torch.from_numpy(np.load(folder / "noise.npy")), Image.open(folder / "condition.png")
    found = {name: generate(root, settings, each.eval(), *given) for name, each in (("ours", ours), ("theirs", theirs))}
    return {**found, "keys": len(info["missing_keys"]) + len(info["unexpected_keys"])}


def check_lora(folder, settings):
    """`check_controlnet` for LoRA files."""
    root = Path(settings["root"])
    noise = torch.from_numpy(np.load(folder / "noise.npy"))
    pipeline = diffusers.FluxPipeline.from_pretrained(root)
    path = folder / "ours" / LORA_FILE
    loaded = set()
    pipeline.load_lora_weights(path)
    for prefix in ("transformer", "text_encoder"):
        loaded |= {
            f"{prefix}.{key}"
            for key in peft.get_peft_model_state_dict(getattr(pipeline, prefix), adapter_name="default_0")
        }
    found = {"keys": len(loaded ^ set(load_file(path)))}
    found["ours"] = reference.generate_flux(
        root, settings, noise, transformer=pipeline.transformer, text_encoder=pipeline.text_encoder
    )

    transformer = reference.freeze(diffusers.FluxTransformer2DModel.from_pretrained(root / "transformer"))
    clip = reference.freeze(transformers.CLIPTextModel.from_pretrained(root / "text_encoder"))
    layers = {}
    metadata = {}
    targets = {"transformer": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"], "text_encoder": ["q_proj", "out_proj"]}
    for prefix, model in (("transformer", transformer), ("text_encoder", clip)):
        model.add_adapter(peft.LoraConfig(r=6, lora_alpha=9, target_modules=targets[prefix]))
        layers[f"{prefix}_lora_layers"] = peft.get_peft_model_state_dict(changed(model, 0.15))
        metadata[f"{prefix}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    diffusers.FluxPipeline.save_lora_weights(folder / "theirs", **layers, **metadata)
    with safe_open(folder / "theirs" / LORA_FILE, "numpy") as file:
        assert "lora_adapter_metadata" in file.metadata()
    return {
        **found,
        "theirs": reference.generate_flux(root, settings, noise, transformer=transformer, text_encoder=clip),
    }


def main(work):
    torch.manual_seed(0)  # new ControlNets and LoRAs are partly initialized at random
    found = {}
    for folder in sorted(path.parent for path in work.glob("*/settings.json")):
        settings = json.loads((folder / "settings.json").read_text())
        values = (check_lora if settings["kind"] == "flux_lora" else check_controlnet)(folder, settings)
        found.update({f"{settings['kind']} {name}": value for name, value in values.items()})
    np.savez(work / "found.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
