"""Recognises the entries of a LoRA file by the names that various tools give them.

The name of an entry is <prefix><layer><ending>. `LAYOUTS_READ` lists the layouts that can be read; `OTHER_ADAPTERS` and
`OTHER_MODELS` list what is rejected with its name. Anything else is rejected with the name of the entry.
`flux_layer_names` has the names of the layers.

The names are those written or read by diffusers `loaders/lora_conversion_utils.py`, sd-scripts `networks/lora_flux.py`,
ComfyUI `comfy/lora.py`, OneTrainer `util/convert/lora/convert_flux_lora.py`, x-flux `src/flux/modules/layers.py` and
peft. Pure Python; a ValueError says what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple, Optional


class Layout(NamedTuple):
    name: str
    tools: str
    example: str
    pattern: str  # matches the start of an entry's name


# A file has the first layout whose pattern matches any of its entries.
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

_EMBEDDINGS = "embeddings trained together with the LoRA by OneTrainer"
# Other adapters than LoRA, DoRA and LoKr, and other contents, by the ending of an entry's name.
OTHER_ADAPTERS = (
    ("LoHa of LyCORIS", r"\.hada_(w|t)\w*"),
    ("LoKr with a Tucker core", r"\.lokr_t\w*"),
    ("GLoRA of LyCORIS", r"\.[ab][12m]\d?\.weight"),
    ("OFT or BOFT", r"\.b?oft_\w+(\.\w+)*"),
    ("IA3", r"\.(on_input|ia3_l(\.\w+)*)"),
    ("VeRA", r"\.vera_lambda_\w(\.\w+)*"),
    ("DoRA of kohya's layout or LyCORIS", r"\.dora_scale"),
    ("LoCon with a Tucker core", r"\.lora_mid(\.weight)?"),
    ("LoRA with biases of A", r"\.(lora_A|lora_down|down)(\.\w+)?\.bias"),
    ("LoRA of an embedding", r"\.lora_embedding_[AB](\.\w+)*"),
    ("full differences of weights, biases or norms", r"\.(diff|diff_b|w_norm|b_norm|set_weight|reshape_weight)"),
    (_EMBEDDINGS, r"bundle_emb\..*"),
)

# Other models, by names that only their layers have.
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
_LOKR = re.compile(r"(.+)\.lokr_(w[12](?:_[ab])?)(?:\.([^.]+))?")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.(?!weight$)([^.]+))?(?:\.weight)?")
_ALPHA = re.compile(r"(.+?)(?:[._]lora(\d?)(?:_linear_layer)?)?\.(?:lora_)?alpha")


def layout_of(names: Iterable[str]) -> Optional[str]:
    """The name of the layout in `LAYOUTS_READ` of a file with these entries; None if it is not a LoRA."""
    names = [name for name in names if _is_weight(name)]
    matches = (layout.name for layout in LAYOUTS_READ if any(re.match(layout.pattern, name) for name in names))
    return next(matches, None)


def modules(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Module name in the file -> role -> name of the entry.

    The roles are "a", "b", "bias" (of B), "magnitude" (of a DoRA) and "alpha", or those of a LoKr: "w1" or "w1_a" and
    "w1_b", "w2" or "w2_a" and "w2_b", and "alpha". Raises ValueError, which says what the file is and what to do,
    unless it is a LoRA, DoRA or LoKr of FLUX.1.
    """
    names, found, adapters = list(names), {}, set()
    _reject_others(names)
    for name in names:
        parsed = _parse(name)
        if parsed is None:
            raise ValueError(f"{name} is neither A nor B nor alpha of a LoRA. Give a LoRA, DoRA or LoKr of FLUX.1")
        module, role, adapter = parsed
        entries = found.setdefault(module, {})
        if role != "alpha":
            adapters.add(adapter)
        if len(adapters) > 1:
            several = ", ".join(sorted(str(adapter or "one without a name") for adapter in adapters))
            raise ValueError(f"holds several adapters ({several}). Save one of them alone")
        if role in entries:
            raise ValueError(f"{entries[role]} and {name} are the same half of one LoRA. Keep one of them")
        entries[role] = name
    return found


def _is_weight(name: str) -> bool:
    """True for an entry that is part of a weight change."""
    return bool(_HALF.fullmatch(name) or _LOKR.fullmatch(name))


def _parse(name: str) -> Optional[tuple[str, str, Optional[str]]]:
    """(module, role, name of the adapter) of an entry, or None."""
    if match := _ALPHA.fullmatch(name):
        return match[1] + (match[2] or ""), "alpha", None
    if name.endswith(".bias") and (match := _HALF.fullmatch(f"{name[: -len('bias')]}weight")):
        return match[1] + (match[2] or ""), "bias", match[4]
    if match := _HALF.fullmatch(name):
        return match[1] + (match[2] or ""), "a" if match[3] else "b", match[4]
    if match := _LOKR.fullmatch(name):
        return match[1], match[2], match[3]
    if match := _MAGNITUDE.fullmatch(name):
        return match[1], "magnitude", match[2]
    return None


def _reject_others(names: list[str]) -> None:
    """Raises ValueError for other adapters, other models and other files."""
    others = [
        (adapter, name) for adapter, ending in OTHER_ADAPTERS for name in names if re.search(f"(?:{ending})$", name)
    ]
    if not any(map(_is_weight, names)) and {adapter for adapter, _ in others} <= {_EMBEDDINGS}:
        raise ValueError(
            f"holds no lora_A/lora_B or lora_down/lora_up weights{_describe_file(names)}. Give a LoRA of FLUX.1"
        )
    for model, pattern in OTHER_MODELS:
        if other := next((name for name in names if re.search(pattern, name)), None):
            raise ValueError(f"made for {model} ({other}). Give a LoRA of FLUX.1")
    if t5 := next((name for name in names if _T5.search(name)), None):
        raise ValueError(f"adapts T5 ({t5}), which is not supported. Save it without its T5 part")
    if others:
        adapter, name = others[0]
        raise ValueError(
            f"holds {name}: {adapter}. Only LoRA, DoRA (with lora_magnitude_vector) and LoKr are supported; train or "
            "save the adapter as one of them"
        )


def _describe_file(names: list[str]) -> str:
    """The rest of a sentence, about a file without LoRA weights."""
    if not names:
        return ": it holds no tensors at all"
    if any(re.search(r"^(clip_[lg]|t5xxl|emb_params|string_to_param.*|<.*>|bundle_emb.*)$", name) for name in names):
        return f", but a textual inversion embedding ({names[0]})"
    if any(name.endswith((".weight", ".bias", ".scale")) for name in names):
        return f", but full weights like a model's checkpoint ({names[0]})"
    return f" ({names[0]})"
