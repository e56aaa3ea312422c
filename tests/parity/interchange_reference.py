"""The PyTorch side of the interchange check: loads the files of our scripts and writes files for them.

    python interchange_reference.py WORK

Reads WORK/<kind>/ours*, settings.json, noise.npy, condition.png and mask.png; writes WORK/<kind>/theirs* and
WORK/found.npz.
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


FURTHER_LORAS = {  # kind -> its pipeline, and the layers that `write_further_lora` adapts
    "flux_kontext": (diffusers.FluxKontextPipeline, ["attn.to_q", "attn.to_add_out", "ff.net.0.proj", "proj_mlp"]),
    "flux_control": (diffusers.FluxControlPipeline, None),
    "flux_fill": (diffusers.FluxFillPipeline, None),
}


def check_further_loras(folder, settings):
    """`check_controlnet` for LoRAs of Kontext, and for Control-LoRAs, which are loaded on the base as it is."""
    kind = settings["kind"]
    root = Path(settings["root"])
    noise = torch.from_numpy(np.load(folder / "noise.npy"))
    condition, mask = (Image.open(folder / f"{name}.png") for name in ("condition", "mask"))

    def generate(transformer):
        if kind == "flux_kontext":
            return reference.generate_flux_kontext(root, settings, transformer, noise, condition)
        shown = (condition, mask) if kind == "flux_fill" else (condition,)
        return reference.generate_flux_control(root, settings, transformer, noise, *shown)

    found = {}
    for name in sorted(path.name for path in folder.glob("ours*")):
        pipeline = FURTHER_LORAS[kind][0].from_pretrained(root)
        pipeline.load_lora_weights(folder / name / LORA_FILE)
        found[name] = generate(pipeline.transformer)
        found.setdefault("keys", 0)
        found["keys"] += wrong_tensors(pipeline.transformer, load_file(folder / name / LORA_FILE))
    found["theirs"] = generate(write_further_lora(root, folder / "theirs", kind, biases=False))
    if kind == "flux_control":
        found["theirs_bias"] = generate(write_further_lora(root, folder / "theirs_bias", kind, biases=True))
    return found


def wrong_tensors(transformer, tensors):
    """The number of tensors of a file that the transformer has not got from it, and of those that are not in it."""
    state = {f"transformer.{name}": value for name, value in transformer.state_dict().items()}
    norms = {name for name in tensors if ".lora_" not in name}
    unequal = sum(not torch.equal(state[name], tensors[name]) for name in norms)
    return unequal + len(loaded_keys({"transformer": transformer}) ^ (tensors.keys() - norms))


def write_further_lora(root, out, kind, biases):
    """Writes a LoRA as the training scripts of diffusers do. Returns the transformer with it.

    Those of Control-LoRAs write no alpha, which is the rank, and give the trained norms the prefix transformer., to
    which save_lora_weights adds another one.
    """
    transformer, _ = new_models(root)
    pipeline, targets = FURTHER_LORAS[kind]
    if kind != "flux_kontext":
        channels = json.loads((root / "vae" / "config.json").read_text())["latent_channels"]
        reference.widen(transformer, 8 * channels + (256 if kind == "flux_fill" else 0))
        targets = reference.linear_layers(transformer)
    alpha = 9 if kind == "flux_kontext" else 6
    transformer.add_adapter(peft.LoraConfig(r=6, lora_alpha=alpha, target_modules=targets, lora_bias=biases))
    if kind == "flux_kontext":
        further, metadata = {}, {"transformer_lora_adapter_metadata": transformer.peft_config["default"].to_dict()}
    else:
        reference.train_norms(transformer)
        norms = {name: p for name, p in transformer.named_parameters() if p.requires_grad and ".lora_" not in name}
        further, metadata = {f"transformer.{name}": norm for name, norm in norms.items()}, {}
    layers = {**peft.get_peft_model_state_dict(changed(transformer, 0.15)), **further}
    pipeline.save_lora_weights(out, transformer_lora_layers=layers, **metadata)
    found = load_file(out / LORA_FILE)
    assert biases == any(name.endswith(".lora_B.bias") for name in found)
    assert bool(further) == any(name.startswith("transformer.transformer.") for name in found)
    return transformer


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
        check = check_further_loras if settings["kind"] in FURTHER_LORAS else check_controlnet
        values = (check_lora if settings["kind"] == "flux_lora" else check)(folder, settings)
        found.update({f"{settings['kind']} {name}": value for name, value in values.items()})
    np.savez(work / "found.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
