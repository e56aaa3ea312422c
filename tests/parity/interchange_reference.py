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
    """`check_controlnet` for LoRA, DoRA and LoKr files."""
    root = Path(settings["root"])
    noise = torch.from_numpy(np.load(folder / "noise.npy"))
    found = {}

    def note(name, transformer, clip):
        found[name] = reference.generate_flux(root, settings, noise, transformer=transformer, text_encoder=clip)

    for end, dora in (("", False), ("_dora", True)):
        pipeline = diffusers.FluxPipeline.from_pretrained(root)
        pipeline.load_lora_weights(folder / f"ours{end}" / LORA_FILE)
        parts = {"transformer": pipeline.transformer, "text_encoder": pipeline.text_encoder}
        found[f"keys{end}"] = len(loaded_keys(parts) ^ set(load_file(folder / f"ours{end}" / LORA_FILE)))
        note(f"ours{end}", *parts.values())
        note(f"theirs{end}", *write_lora(root, folder / f"theirs{end}", dora))
    models, found["keys_lokr"] = load_lokr(root, folder / "ours_lokr" / LORA_FILE)
    note("ours_lokr", *models)
    return found


def loaded_keys(models):
    """The names of the adapter's tensors in the models of a pipeline, as diffusers saves them."""
    found = set()
    for prefix, model in models.items():
        found |= {f"{prefix}.{key}" for key in peft.get_peft_model_state_dict(model, adapter_name="default_0")}
    return found


def new_models(root):
    transformer = reference.freeze(diffusers.FluxTransformer2DModel.from_pretrained(root / "transformer"))
    return transformer, reference.freeze(transformers.CLIPTextModel.from_pretrained(root / "text_encoder"))


def write_lora(root, out, dora):
    """Writes a LoRA or DoRA with diffusers. Returns the transformer and CLIP with it."""
    models, layers, metadata = new_models(root), {}, {}
    targets = {"transformer": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"], "text_encoder": ["q_proj", "out_proj"]}
    for prefix, model in zip(targets, models):
        model.add_adapter(peft.LoraConfig(r=6, lora_alpha=9, target_modules=targets[prefix], use_dora=dora))
        layers[f"{prefix}_lora_layers"] = peft.get_peft_model_state_dict(changed(model, 0.15))
        metadata[f"{prefix}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    diffusers.FluxPipeline.save_lora_weights(out, **layers, **metadata)
    with safe_open(out / LORA_FILE, "numpy") as file:
        assert "lora_adapter_metadata" in file.metadata()
    return models


def load_lokr(root, path):
    """Loads a LoKr in LyCORIS' layout into peft's layers. Returns the models and the number of keys that do not match.

    Its alpha is its rank, 4, so its scale is 1, as peft's alpha / rank.
    """
    models, tensors, wrong = new_models(root), load_file(path), 0
    for prefix, model in zip(("lycoris_", "lora_te1_"), models):
        names = {name.replace(".", "_"): name for name, _ in model.named_modules()}
        state = {}
        for name, value in tensors.items():
            layer, _, factor = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and factor != "alpha":
                state[f"{names[layer]}.{factor}"] = value
        layers = sorted({name.rpartition(".")[0] for name in state})
        peft.inject_adapter_in_model(peft.LoKrConfig(r=4, alpha=4, target_modules=layers), model)
        result = peft.set_peft_model_state_dict(model, state)
        wrong += len(result.unexpected_keys) + sum("lokr_" in key for key in result.missing_keys)
    return models, wrong


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
