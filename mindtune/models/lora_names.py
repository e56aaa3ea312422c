"""What the entries of a LoRA file are called by the tools that write them, and which layers of FLUX.1 they mean.

An entry is named <prefix><layer><end>. `LAYOUTS_READ` lists the layouts that are read, `OTHER_KINDS` and `OTHER_MODELS`
what is recognised and refused with its name; everything else is refused by the name of the entry. Layers have two sets of
names: diffusers' and those of Black Forest Labs' own model ("native"), in which q, k and v are one weight. Files of kohya
and OneTrainer have _ for every dot, so names are compared that way.

Names as written or read by diffusers `loaders/lora_conversion_utils.py`, sd-scripts `networks/lora_flux.py`, ComfyUI
`comfy/lora.py`, OneTrainer `util/convert/lora/convert_flux_lora.py`, x-flux `src/flux/modules/layers.py` and peft. Pure
Python; raises ValueError with a sentence that says what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple, Optional


class Layout(NamedTuple):
    name: str
    tools: str
    example: str
    pattern: str  # of the start of an entry's name


# The first whose pattern fits any entry names the layout of a file.
LAYOUTS_READ = (
    Layout(
        "onetrainer", "OneTrainer", "lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight",
        r"lora_transformer|lora_te\d?\.",
    ),
    Layout(
        "kohya", "kohya's sd-scripts", "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        r"lora_unet|lora_te\d?_",
    ),
    Layout(
        "lycoris", "SimpleTuner, LyCORIS with algo=lora", "lycoris_transformer_blocks_0_attn_to_q.lora_down.weight",
        r"lycoris_",
    ),
    Layout(
        "omi", "OneTrainer (OMI)", "transformer.double_blocks.0.img_attn.qkv.0.lora_down.weight",
        r"transformer\.((double|single)_blocks|(img|txt|time|vector|guidance)_in|final_layer)\.|clip_l\.|t5\.",
    ),
    Layout(
        "x-flux", "x-flux (XLabs)", "double_blocks.0.processor.qkv_lora1.down.weight",
        r"(diffusion_model\.)?(double|single)_blocks\.\d+\.processor\.",
    ),
    Layout(
        "comfyui", "ComfyUI", "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
        r"(model\.)?diffusion_model|text_encoders\.",
    ),
    Layout(
        "peft", "peft", "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight",
        r"(unet\.|transformer\.)?base_model\.",
    ),
    Layout(
        "diffusers", "diffusers, ai-toolkit", "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        r"(transformer|text_encoder|unet)\.",
    ),
    Layout(
        "native", "names of Black Forest Labs' model", "double_blocks.0.img_attn.qkv.lora_A.weight",
        r"(double|single)_blocks\.",
    ),
    Layout(
        "bare", "DiffSynth, peft without prefix", "transformer_blocks.0.attn.to_q.lora_A.default.weight",
        r"",
    ),
)  # fmt: skip

_CONTROL, _EMBEDDINGS = (
    "control LoRA of Black Forest Labs, which also sets norms",
    "embeddings trained along by OneTrainer",
)
# Adapters that are no plain LoRA, and what else files may hold, by the end of an entry's name.
OTHER_KINDS = (
    ("LoHa of LyCORIS", r"\.hada_(w|t)\w*"),
    ("LoKr of LyCORIS", r"\.lokr_(w|t)\w*"),
    ("GLoRA of LyCORIS", r"\.[ab][12m]\d?\.weight"),
    ("OFT or BOFT", r"\.b?oft_\w+(\.\w+)*"),
    ("IA3", r"\.(on_input|ia3_l(\.\w+)*)"),
    ("VeRA", r"\.vera_lambda_\w(\.\w+)*"),
    ("DoRA", r"\.(dora_scale|lora_magnitude_vector(\.\w+)*)"),
    ("LoCon with a Tucker core", r"\.lora_mid(\.weight)?"),
    (_CONTROL, r"\.(query_norm|key_norm)\.scale|\.norm_(added_)?[qk]\.weight"),
    ("LoRA with biases", r"\.(lora_[AB]|lora_up|lora_down|up|down)(\.\w+)?\.bias"),
    ("LoRA of an embedding", r"\.lora_embedding_[AB](\.\w+)*"),
    ("full differences of weights, biases or norms", r"\.(diff|diff_b|w_norm|b_norm|set_weight|reshape_weight)"),
    (_EMBEDDINGS, r"bundle_emb\..*"),
)

# Other models, by what their layers alone are called.
OTHER_MODELS = (
    (
        "Stable Diffusion 1, 2 or SDXL",
        r"(down|up|input|output)_blocks[._]\d|mid(dle)?_block[._]|(te2_|encoder_2\.|clip_g\.).*text_model",
    ),
    ("Stable Diffusion 3", r"joint_blocks[._]\d|pos_embed[._]proj"),
    ("Wan", r"(^|\.|lora_unet_|lora_transformer_)blocks[._]\d+[._](self_attn|cross_attn|ffn|attn1|attn2)"),
    ("HunyuanVideo", r"token_refiner|(img|txt)_mlp[._]fc|(img|txt)_mod[._]linear|modulation[._]linear"),
    ("FLUX.2", r"stream_modulation|to_qkv_mlp_proj|ff(_context)?[._]linear_(in|out)"),
    ("Qwen-Image", r"transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)"),
    ("Chroma", r"distilled_guidance_layer"),
    ("Z-Image or Lumina", r"(context|noise)_refiner|layers[._]\d+[._](attention|feed_forward)[._]"),
    ("HiDream", r"(double|single)_stream_blocks"),
    ("AuraFlow", r"joint_transformer_blocks|(double|single)_layers"),
    (
        "another diffusion transformer, such as LTX-Video, PixArt or CogVideoX",
        r"transformer_blocks[._]\d+[._]attn[12][._]",
    ),
    ("a language model", r"(?<!text_)model[._]layers[._]\d+[._](self_attn|mlp)"),
)

_T5 = re.compile(r"encoder[._]block[._]\d+[._]layer|t5xxl|lora_te3")
_HALF = re.compile(
    r"(.+?)[._]lora(\d?)(?:_linear_layer)?[._](?:(A|down)|B|up)(?:\.(?!weight$|bias$)([^.]+))?(?:\.weight)?", re.I
)
_ALPHA = re.compile(r"(.+?)(?:[._]lora(\d?)(?:_linear_layer)?)?\.(?:lora_)?alpha")


def _native_layers() -> dict[str, list[str]]:
    """Layer of Black Forest Labs' model -> diffusers' layers that it holds, from its first row to its last; # for a block's number."""
    embed, double, single = "time_text_embed", "transformer_blocks.#", "single_transformer_blocks.#"
    table = {"img_in": ["x_embedder"], "txt_in": ["context_embedder"], "final_layer.linear": ["proj_out"]}
    table["final_layer.adaLN_modulation.1"] = ["norm_out.linear"]
    for native, ours in (
        ("time_in", "timestep_embedder"),
        ("vector_in", "text_embedder"),
        ("guidance_in", "guidance_embedder"),
    ):
        table[f"{native}.in_layer"], table[f"{native}.out_layer"] = (
            [f"{embed}.{ours}.linear_1"],
            [f"{embed}.{ours}.linear_2"],
        )
    streams = (
        ("img", "to_{}", "to_out.0", "ff", "norm1"),
        ("txt", "add_{}_proj", "to_add_out", "ff_context", "norm1_context"),
    )
    for stream, projection, out, feed_forward, norm in streams:
        block = f"double_blocks.#.{stream}"
        table[f"{block}_attn.qkv"] = [f"{double}.attn.{projection.format(letter)}" for letter in "qkv"]
        table[f"{block}_attn.proj"] = [f"{double}.attn.{out}"]
        table[f"{block}_mlp.0"], table[f"{block}_mlp.2"] = (
            [f"{double}.{feed_forward}.net.0.proj"],
            [f"{double}.{feed_forward}.net.2"],
        )
        table[f"{block}_mod.lin"] = [f"{double}.{norm}.linear"]
    table["single_blocks.#.linear1"] = [f"{single}.attn.to_{letter}" for letter in "qkv"] + [f"{single}.proj_mlp"]
    table["single_blocks.#.linear2"] = [f"{single}.proj_out"]
    table["single_blocks.#.modulation.lin"] = [f"{single}.norm.linear"]
    return table


NATIVE = _native_layers()
SWAPPED = "final_layer.adaLN_modulation.1"  # gives shift and scale, norm_out.linear scale and shift
CLIP = [
    f"text_model.encoder.layers.#.{name}"
    for name in ("mlp.fc1", "mlp.fc2", *(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")))
]
_BLOCKS = {
    "transformer_blocks": 19,
    "single_transformer_blocks": 38,
    "text_model": 12,
}  # in FLUX.1, where CLIP is CLIP-L


def _all_names() -> dict[str, dict[str, list[str]]]:
    """Model -> every name of a layer in any layout, with _ for dots -> the layers in diffusers' names that it holds."""
    transformer = dict(NATIVE)
    for native, layers in NATIVE.items():
        transformer.update({layer: [layer] for layer in layers})
        if len(layers) > 1:  # OMI counts the parts; others give them letters
            transformer.update({f"{native}.{number}": [layer] for number, layer in enumerate(layers)})
        if native.endswith("attn.qkv"):
            transformer.update({f"{native[:-3]}{letter}": [layer] for letter, layer in zip("qkv", layers)})
    for number, stream in enumerate(("img", "txt"), 1):  # x-flux
        for name in ("qkv", "proj"):
            transformer[f"double_blocks.#.processor.{name}{number}"] = NATIVE[f"double_blocks.#.{stream}_attn.{name}"]
    first_three = NATIVE["single_blocks.#.linear1"][:3]
    transformer["single_blocks.#.processor.qkv"] = transformer["single_blocks.#.linear1_qkv"] = first_three
    transformer["single_blocks.#.processor.proj"] = NATIVE["single_blocks.#.linear2"]
    transformer["img_in.proj"] = NATIVE["img_in"]
    for name in list(transformer):  # diffusers before peft: attn.processor.to_q_lora, attn.to_out
        if ".attn.to_" in name or ".attn.add_" in name:
            transformer[name.replace(".attn.", ".attn.processor.").replace("to_out.0", "to_out")] = transformer[name]
    clip = {name: [name] for name in CLIP}
    clip.update({name[len("text_model.") :]: [name] for name in CLIP})
    clip.update({re.sub(r"self_attn\.(\w+)_proj", r"self_attn.to_\1", name): [name] for name in CLIP})
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
_MODULE = {
    model: re.compile(f"(?:{'|'.join(_WRAPPERS + _PREFIXES[model])})*({'|'.join(names).replace('#', '[0-9]+')})")
    for model, names in _NAMES.items()
}


def layout_of(names: Iterable[str]) -> Optional[str]:
    """The layout of a file with these entries, one of `LAYOUTS_READ` by name, or None if it is no LoRA."""
    names = [name for name in names if _HALF.fullmatch(name)]
    fits = (layout.name for layout in LAYOUTS_READ if any(re.match(layout.pattern, name) for name in names))
    return next(fits, None)


def modules(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Module, as the file names it -> "a", "b" and perhaps "alpha" -> name of the entry.

    Raises ValueError if the entries are not those of a plain LoRA of FLUX.1: it says what they are instead and what to do.
    """
    names, found, adapters = list(names), {}, set()
    _refuse_others(names)
    for name in names:
        half, alpha = _HALF.fullmatch(name), _ALPHA.fullmatch(name)
        if not (alpha or half):
            raise ValueError(f"{name} is neither A nor B nor alpha of a LoRA. Give a plain LoRA of FLUX.1")
        match = alpha or half
        role = "alpha" if alpha else "a" if half[3] else "b"
        entry = found.setdefault(match[1] + match[2] if match[2] else match[1], {})
        if half and not alpha:
            adapters.add(half[4])
        if len(adapters) > 1:
            several = ", ".join(sorted(str(adapter or "one without a name") for adapter in adapters))
            raise ValueError(f"holds several adapters ({several}). Save one of them alone")
        if role in entry:
            raise ValueError(f"{entry[role]} and {name} are the same half of one LoRA. Keep one of them")
        entry[role] = name
    return found


def _refuse_others(names: list[str]) -> None:
    kinds = [(kind, name) for kind, end in OTHER_KINDS for name in names if re.search(f"(?:{end})$", name)]
    if not any(map(_HALF.fullmatch, names)) and {kind for kind, _ in kinds} <= {_CONTROL, _EMBEDDINGS}:
        raise ValueError(
            f"holds no lora_A/lora_B or lora_down/lora_up weights{_what_instead(names)}. Give a LoRA of FLUX.1"
        )
    for model, pattern in OTHER_MODELS:
        if other := next((name for name in names if re.search(pattern, name)), None):
            raise ValueError(f"made for {model} ({other}). Give a LoRA of FLUX.1")
    if t5 := next((name for name in names if _T5.search(name)), None):
        raise ValueError(f"adapts T5 ({t5}), which is neither trained nor adapted here. Save it without its T5 part")
    if kinds:
        kind, name = kinds[0]
        raise ValueError(f"holds {name}: {kind}. Only plain LoRA is read (A, B and alpha); train or save it as that")


def _what_instead(names: list[str]) -> str:
    if not names:
        return ": it holds no tensors at all"
    if any(re.search(r"^(clip_[lg]|t5xxl|emb_params|string_to_param.*|<.*>|bundle_emb.*)$", name) for name in names):
        return f", but an embedding of textual inversion ({names[0]})"
    if any(name.endswith((".weight", ".bias", ".scale")) for name in names):
        return f", but whole weights as a model's checkpoint does ({names[0]})"
    return f" ({names[0]})"


def where(module: str) -> tuple[str, list[str], bool]:
    """Model, its layers in diffusers' names whose rows the module's B holds, in order, and whether B's halves are swapped there.

    Raises ValueError if FLUX.1 has no such layer.
    """
    name = re.sub(r"\.|\$\$", "_", module)
    for model, pattern in _MODULE.items():
        if match := pattern.fullmatch(name):
            layer = match[1]
            number = re.search(r"(?:blocks|layers)_(\d+)_", layer)
            template = layer[: number.start(1)] + "#" + layer[number.end(1) :] if number else layer
            layers = _NAMES[model][template]
            count = _BLOCKS.get(layers[0].split(".")[0])
            if number and int(number[1]) >= count:
                raise ValueError(
                    f"FLUX.1 has no layer {module}, its blocks there are {count}: made for another model. Give a LoRA of FLUX.1"
                )
            return (
                model,
                [layer.replace("#", number[1]) if number else layer for layer in layers],
                template == SWAPPED.replace(".", "_"),
            )
    raise ValueError(f"FLUX.1 has no layer {module}. Give a LoRA of FLUX.1")
