"""The names of FLUX.1's layers in every LoRA layout.

Layers have two sets of names: diffusers' and those of Black Forest Labs' own model ("native"), in which q, k and v are
one weight. Files of kohya and OneTrainer have _ in place of every dot, so names are compared in that form.
"""

from __future__ import annotations

import re
from typing import Optional


def _native_layers() -> dict[str, list[str]]:
    """Native layer -> the diffusers layers that it contains, in the order of its rows. # is the number of a block."""
    embed, double, single = "time_text_embed", "transformer_blocks.#", "single_transformer_blocks.#"
    table = {"img_in": ["x_embedder"], "txt_in": ["context_embedder"], "final_layer.linear": ["proj_out"]}
    table["final_layer.adaLN_modulation.1"] = ["norm_out.linear"]
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
    for native, embedder in embedders.items():
        table[f"{native}.in_layer"] = [f"{embed}.{embedder}.linear_1"]
        table[f"{native}.out_layer"] = [f"{embed}.{embedder}.linear_2"]
    streams = (
        ("img", "to_{}", "to_out.0", "ff", "norm1"),
        ("txt", "add_{}_proj", "to_add_out", "ff_context", "norm1_context"),
    )
    for stream, projection, out, feed_forward, norm in streams:
        block = f"double_blocks.#.{stream}"
        table[f"{block}_attn.qkv"] = [f"{double}.attn.{projection.format(letter)}" for letter in "qkv"]
        table[f"{block}_attn.proj"] = [f"{double}.attn.{out}"]
        table[f"{block}_mlp.0"] = [f"{double}.{feed_forward}.net.0.proj"]
        table[f"{block}_mlp.2"] = [f"{double}.{feed_forward}.net.2"]
        table[f"{block}_mod.lin"] = [f"{double}.{norm}.linear"]
    table["single_blocks.#.linear1"] = [f"{single}.attn.to_{letter}" for letter in "qkv"] + [f"{single}.proj_mlp"]
    table["single_blocks.#.linear2"] = [f"{single}.proj_out"]
    table["single_blocks.#.modulation.lin"] = [f"{single}.norm.linear"]
    return table


NATIVE_LAYERS = _native_layers()
# Outputs shift and scale, where diffusers' norm_out.linear outputs scale and shift.
SWAPPED_LAYER = "final_layer.adaLN_modulation.1"
CLIP_LAYERS = [
    f"text_model.encoder.layers.#.{name}"
    for name in ("mlp.fc1", "mlp.fc2", *(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")))
]
# The numbers of blocks in FLUX.1 and in its CLIP, which is CLIP-L.
_BLOCK_COUNTS = {"transformer_blocks": 19, "single_transformer_blocks": 38, "text_model": 12}


def _all_names() -> dict[str, dict[str, list[str]]]:
    """Model -> name of a layer in any layout, with _ for dots -> the diffusers layers that it contains."""
    transformer = dict(NATIVE_LAYERS)
    for native, layers in NATIVE_LAYERS.items():
        transformer.update({layer: [layer] for layer in layers})
        if len(layers) > 1:  # OMI numbers the layers in a native one, other tools add letters
            transformer.update({f"{native}.{number}": [layer] for number, layer in enumerate(layers)})
        if native.endswith("attn.qkv"):
            transformer.update({f"{native[:-3]}{letter}": [layer] for letter, layer in zip("qkv", layers)})
    for number, stream in enumerate(("img", "txt"), 1):  # x-flux
        for name in ("qkv", "proj"):
            native = f"double_blocks.#.{stream}_attn.{name}"
            transformer[f"double_blocks.#.processor.{name}{number}"] = NATIVE_LAYERS[native]
    first_three = NATIVE_LAYERS["single_blocks.#.linear1"][:3]
    transformer["single_blocks.#.processor.qkv"] = transformer["single_blocks.#.linear1_qkv"] = first_three
    transformer["single_blocks.#.processor.proj"] = NATIVE_LAYERS["single_blocks.#.linear2"]
    transformer["img_in.proj"] = NATIVE_LAYERS["img_in"]
    for name in list(transformer):  # diffusers before peft: attn.processor.to_q_lora, attn.to_out
        if ".attn.to_" in name or ".attn.add_" in name:
            transformer[name.replace(".attn.", ".attn.processor.").replace("to_out.0", "to_out")] = transformer[name]
    clip = {name: [name] for name in CLIP_LAYERS}
    clip.update({name[len("text_model.") :]: [name] for name in CLIP_LAYERS})
    clip.update({re.sub(r"self_attn\.(\w+)_proj", r"self_attn.to_\1", name): [name] for name in CLIP_LAYERS})
    tables = {"transformer": transformer, "text_encoder": clip}
    return {
        model: {name.replace(".", "_"): layers for name, layers in table.items()} for model, table in tables.items()
    }


_NAMES = _all_names()
_WRAPPERS = ["base_model_model_", "module_", "_orig_mod_", "model_"]
_PREFIXES = {
    "transformer": ["transformer_", "diffusion_model_", "unet_", "lora_unet_", "lora_transformer_", "lycoris_"],
    "text_encoder": ["text_encoder_", "text_encoders_", "clip_l_", "transformer_", "lora_te_", "lora_te1_"],
}
_MODULE_PATTERNS = {
    model: re.compile(f"(?:{'|'.join(_WRAPPERS + _PREFIXES[model])})*({'|'.join(names).replace('#', '[0-9]+')})")
    for model, names in _NAMES.items()
}


_NORM = re.compile(
    r"(?:(?:base_model|model|diffusion_model|transformer)\.)*"
    r"(?:(?P<diffusers>(?:single_)?transformer_blocks\.\d+\.attn\.norm_(?:added_)?[qk])\.weight"
    r"|(?P<blocks>single|double)_blocks\.(?P<number>\d+)\.(?:(?P<stream>img|txt)_attn\.)?"
    r"norm\.(?P<letter>query|key)_norm\.scale)"
)


def norm_name(name: str) -> Optional[str]:
    """The name in diffusers' layout of a norm of q or k that a Control-LoRA sets; None for any other entry.

    The training script of diffusers writes the prefix transformer. twice, and its pipeline does not load these norms.
    """
    match = _NORM.fullmatch(name)
    if match is None or match["diffusers"]:
        return match and f"transformer.{match['diffusers']}.weight"
    single, added = "single_" * (match["blocks"] == "single"), "added_" * (match["stream"] == "txt")
    return f"transformer.{single}transformer_blocks.{match['number']}.attn.norm_{added}{match['letter'][0]}.weight"


def resolve(module: str) -> tuple[str, list[str], bool]:
    """(model, its diffusers layers in the order of the rows of the module's B, whether the halves of B are swapped).

    Raises ValueError if FLUX.1 has no such layer.
    """
    name = re.sub(r"\.|\$\$", "_", module)
    for model, pattern in _MODULE_PATTERNS.items():
        if match := pattern.fullmatch(name):
            layer = match[1]
            number = re.search(r"(?:blocks|layers)_(\d+)_", layer)
            template = layer[: number.start(1)] + "#" + layer[number.end(1) :] if number else layer
            layers = _NAMES[model][template]
            count = _BLOCK_COUNTS.get(layers[0].split(".")[0])
            if number and int(number[1]) >= count:
                raise ValueError(
                    f"FLUX.1 has no layer {module}, it has {count} of these blocks: made for another model. "
                    "Give a LoRA of FLUX.1"
                )
            if number:
                layers = [name.replace("#", number[1]) for name in layers]
            return model, layers, template == SWAPPED_LAYER.replace(".", "_")
    raise ValueError(f"FLUX.1 has no layer {module}. Give a LoRA of FLUX.1")
