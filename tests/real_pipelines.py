"""Tiny pipelines with the files, keys and tensor names of published ones.

    python tests/real_pipelines.py stable-diffusion-v1-5 /tmp/sd15

Only sizes differ: class names, null entries, missing keys, schedulers, tokenizer files, names and dtypes of weight
files and old tensor names are those of the hub (tests/real_configs.py). Weights are random. Files that no script reads
(safety checker, single files, pickles) have the right names but no content.
"""

from __future__ import annotations

import json
import pickle
import re
import sys
import tempfile
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples/tiny"))

from make_tiny_pipeline import CAPTIONS, make_clip_tokenizer, make_t5_tokenizer, random_weight, write_json
from real_configs import FLUX_PIPELINES, PIPELINES
from real_controlnets import CONTROLNETS, FLUX_CONTROLNETS, VAES

NAMES = tuple(PIPELINES)
TYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "uint8": "U8", "float8_e4m3fn": "F8_E4M3",
}  # fmt: skip
# The states of SDXL's two text encoders are concatenated: 32 + 16 = 48. The second's 16 and six embeddings of 8 make
# 64.
SMALL = {
    "block_out_channels": {
        (320, 640, 1280, 1280): [16, 32, 32, 32], (320, 640, 1280): [16, 32, 32], (128, 256, 512, 512): [8, 16, 16, 16],
    },
    "attention_head_dim": {8: 2, (5, 10, 20, 20): [2, 4, 4, 4], (5, 10, 20): [2, 4, 4]},
    "cross_attention_dim": {768: 32, 1024: 40, 2048: 48},
    "norm_num_groups": {32: 8},
    "layers_per_block": {2: 1},
    "transformer_layers_per_block": {(1, 2, 10): [1, 1, 2], (0, 2, 4): [0, 1, 2]},
    "reverse_transformer_layers_per_block": {((4, 4, 10), (2, 1, 1), 1): [[1, 1, 2], [1, 1, 1], 1]},
    "addition_time_embed_dim": {256: 8},
    "projection_class_embeddings_input_dim": {2816: 64},
    "conditioning_embedding_out_channels": {(16, 32, 96, 256): [8, 8, 16, 32]},
    "hidden_size": {768: 32, 1024: 40, 1280: 16},
    "intermediate_size": {3072: 128, 4096: 160, 5120: 64},
    "projection_dim": {768: 32, 512: 24, 1280: 16},
    "num_hidden_layers": {12: 2, 23: 2, 32: 2},
    # The head dimension stays 128: without axes_dims_rope in the config it is split into 16, 56 and 56.
    "num_attention_heads": {12: 2, 16: 2, 20: 2, 24: 1},
    "num_layers": {19: 1, 24: 2, 2: 1, 5: 1, 6: 1},
    "num_single_layers": {38: 1, 10: 1},
    "joint_attention_dim": {4096: 32},
    "pooled_projection_dim": {768: 32},
    "d_model": {4096: 32}, "d_kv": {64: 8}, "d_ff": {10240: 64}, "num_heads": {64: 4}, "num_decoder_layers": {24: 2},
}  # fmt: skip


def frozen(value):
    """A hashable copy."""
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def small(config: dict) -> dict:
    """The config of a model at a small size: the same keys, and the same values except sizes."""
    made = {key: SMALL.get(key, {}).get(frozen(value), value) for key, value in config.items()}
    if config.get("_class_name") == "AutoencoderKL":
        if "norm_num_groups" in made:
            made["norm_num_groups"] = 4
        else:  # diffusers' default is 32 groups
            made["block_out_channels"] = [32] * 4
    if isinstance(config.get("reverse_transformer_layers_per_block"), list):
        made["layers_per_block"] = config["layers_per_block"]  # the nested lists have an entry per layer
    if config.get("model_type") == "clip_text_model":
        made["vocab_size"] = vocabulary("CLIP")
    if config.get("model_type") == "t5":
        made["vocab_size"] = vocabulary("T5") + 28  # the real one has 28 rows more than its tokenizer has tokens
    return made


# ---- tokenizers ----------------------------------------------------------------------------------


@cache
def tokenizer_files(kind: str) -> dict[str, bytes]:
    """The vocabulary files of a CLIP or T5 tokenizer, trained on the captions of the tiny pipelines."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tokenizer"
        (make_clip_tokenizer if kind == "CLIP" else make_t5_tokenizer)(out, CAPTIONS)
        names = ("vocab.json", "merges.txt") if kind == "CLIP" else ("spiece.model", "tokenizer.json")
        return {name: (out / name).read_bytes() for name in names}


@cache
def token_numbers(kind: str) -> dict[str, int]:
    """Token -> id."""
    files = tokenizer_files(kind)
    if kind == "CLIP":
        return json.loads(files["vocab.json"])
    whole = json.loads(files["tokenizer.json"])
    numbers = {piece: number for number, (piece, _) in enumerate(whole["model"]["vocab"])}
    return {**numbers, **{token["content"]: token["id"] for token in whole["added_tokens"]}}


def vocabulary(kind: str) -> int:
    """The number of ids."""
    return 1 + max(token_numbers(kind).values())


def write_tokenizer(folder: Path, config: dict, special: dict, model_max_length: bool = True) -> None:
    """Writes the published files with a small vocabulary, whose ids replace those in added_tokens_decoder."""
    kind = "CLIP" if config["tokenizer_class"].startswith("CLIP") else "T5"
    folder.mkdir(parents=True)
    for name, content in tokenizer_files(kind).items():
        (folder / name).write_bytes(content)
    config = {key: value for key, value in config.items() if model_max_length or key != "model_max_length"}
    if "added_tokens_decoder" in config:
        tokens = config["added_tokens_decoder"].values()
        numbers = token_numbers(kind)
        config["added_tokens_decoder"] = {str(numbers[token["content"]]): token for token in tokens}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)


# ---- weights -------------------------------------------------------------------------------------


def parameter_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Parameter name, as current versions save it -> shape, of the model of a config.json."""
    import mindone.diffusers
    import mindone.transformers
    from mindspore.nn.utils import no_init_parameters

    from mindtune.models.named_parameters import hf_name

    with no_init_parameters():
        if "architectures" in config:
            cls = getattr(mindone.transformers, config["architectures"][0])
            cell = cls(cls.config_class(**config))
        else:
            cls = getattr(mindone.diffusers, config["_class_name"])
            unknown = ("num_control_type",)
            cell = cls(**{k: v for k, v in config.items() if not k.startswith("_") and k not in unknown})
    return {hf_name(name): tuple(parameter.shape) for name, parameter in cell.parameters_and_names()}


def draw(config: dict, seed: int) -> dict[str, np.ndarray]:
    """Random float32 weights by their current names, sorted by name."""
    rng = np.random.default_rng(seed)
    shapes = parameter_shapes(config)
    tensors = {name: random_weight(rng, name, shapes[name]) for name in sorted(shapes)}
    if "decoder.conv_out.weight" in tensors:
        tensors["decoder.conv_out.weight"] *= np.float32(0.5)  # within [-1, 1] nearly everywhere
    return tensors


def version(config: dict, key: str) -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(int(number) for number in re.findall(r"\d+", config[key])[:2])


def old_names(tensors: dict, shape: str = "matrix") -> dict[str, np.ndarray]:
    """The tensors with a VAE's attention named as by diffusers before 0.17.

    `shape` "convolution" gives its weights the shape [C, C, 1, 1] of converted checkpoints instead of [C, C].
    """
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    made = {}
    for name, value in tensors.items():
        found = re.fullmatch(r"(.*attentions\.\d+\.)(to_q|to_k|to_v|to_out\.0)(\.\w+)", name)
        if found:
            name = found[1] + renamed[found[2]] + found[3]
            if shape == "convolution" and value.ndim == 2:
                value = value[:, :, None, None]
        made[name] = value
    return made


def as_published(config: dict, tensors: dict, variant: str) -> dict[str, np.ndarray]:
    """The tensors with the names and dtypes of the published files, and with tensors that current models lack."""
    dtype = np.float16 if variant == "fp16" else np.float32
    flux = config.get("_class_name", "").startswith("Flux") or config.get("latent_channels") == 16
    if flux or config.get("torch_dtype") == "bfloat16":
        dtype = ml_dtypes.bfloat16
    made = {name: value.astype(dtype) for name, value in tensors.items()}
    old_vae = config.get("_class_name") == "AutoencoderKL" and version(config, "_diffusers_version") < (0, 17)
    if old_vae and variant != "fp16":
        made = old_names(made)
    if config.get("model_type") == "clip_text_model" and version(config, "transformers_version") < (4, 31):
        made["text_model.embeddings.position_ids"] = np.arange(77, dtype=np.int64)[None]
    return made


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes one file, in the given order. The writer of the library does not support every dtype."""
    entries = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, value in tensors.items():
        begin = end
        end += value.nbytes
        entries[name] = {"dtype": TYPES[value.dtype.name], "shape": list(value.shape), "data_offsets": [begin, end]}
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    data = b"".join(np.ascontiguousarray(value).tobytes() for value in tensors.values())
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)


def write_weights(folder: Path, stem: str, tensors: dict[str, np.ndarray], variant: str = "", shards: int = 1) -> None:
    """Writes one file, or `shards` files of about equal numbers of tensors with their index, with the usual names."""
    middle = f".{variant}" if variant else ""
    if shards == 1:
        return write_safetensors(folder / f"{stem}{middle}.safetensors", tensors)
    weight_map = {}
    names = list(tensors)
    for number in range(shards):
        name = f"{stem}{middle}-{number + 1:05d}-of-{shards:05d}.safetensors"
        own = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        write_safetensors(folder / name, {each: tensors[each] for each in own})
        weight_map.update(dict.fromkeys(own, name))
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / f"{stem}.safetensors.index{middle}.json", index)


def write_model(folder: Path, config: dict, seed: int, variants=("",), shards: int = 1) -> None:
    """Writes config.json and weights of a model at a small size; `config` is the published one."""
    config = small(config)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    tensors = draw(config, seed)
    for variant in variants:
        stem = "model" if "architectures" in config else "diffusion_pytorch_model"
        write_weights(folder, stem, as_published(config, tensors, variant), variant, shards)


# ---- pipelines, VAEs, ControlNets ----------------------------------------------------------------

PUBLISHED_SHARDS = {"transformer": 3, "text_encoder_2": 2}  # of FLUX.1; every other model is one file
SINGLE_FILES = {
    "FLUX.1-dev": "flux1-dev",
    "FLUX.1-schnell": "flux1-schnell",
    "stable-diffusion-v1-5": "v1-5-pruned-emaonly",
}


def make(
    name: str,
    out: Path,
    seed: int = 0,
    variants=("",),
    shards=None,
    extras: bool = False,
    model_max_length: bool = True,
) -> Path:
    """Writes the pipeline `name` to the new folder `out`, about 2 MB.

    `variants`: of the weight files, "" and "fp16". `shards`: component -> number of files; FLUX has the published
    numbers by default. `extras`: add the pickles, copies and single files that are beside the weights on the hub.
    `model_max_length` False: leave it out of the tokenizer files.
    """
    out = Path(out)
    files = PIPELINES[name]
    shards = shards or (PUBLISHED_SHARDS if name in FLUX_PIPELINES else {})
    out.mkdir(parents=True)
    for path, content in files.items():
        part = path.partition("/")[0]
        if path.endswith("tokenizer_config.json"):
            write_tokenizer(out / part, content, files[f"{part}/special_tokens_map.json"], model_max_length)
        elif path.endswith("/config.json") and part != "safety_checker":
            write_model(out / part, content, seed, variants, shards.get(part, 1))
        elif not path.endswith("special_tokens_map.json"):
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            write_json(out / path, content)
    if extras:
        write_extras(out, SINGLE_FILES.get(name, name))
    return out


def write_extras(out: Path, single: str) -> None:
    """Writes files that no script may read: each is invalid, so that reading it fails."""
    for folder in sorted(path.parent for path in out.glob("*/config.json")):
        transformers = folder.name.startswith(("text_encoder", "safety_checker"))
        stem = "model" if transformers else "diffusion_pytorch_model"
        (folder / f"{'pytorch_model' if transformers else stem}.bin").write_bytes(pickle.dumps("torn"))
        (folder / f"{stem}.non_ema.safetensors").write_bytes(b"torn")
        (folder / "flax_model.msgpack").write_bytes(b"torn")
        (folder / "model.onnx").write_bytes(b"torn")
    for name in (f"{single}.safetensors", f"{single}.ckpt"):
        (out / name).write_bytes(b"torn")


def make_vae(name: str, out: Path, seed: int = 0, variants=("",)) -> Path:
    """Writes a published VAE at a small size."""
    write_model(Path(out), VAES[name], seed, variants)
    return Path(out)


def make_controlnet(name: str, out: Path, seed: int = 0, variants=("",)) -> Path:
    """Writes a published ControlNet at a small size, for the small pipeline of its base model."""
    out = Path(out)
    config = {**CONTROLNETS, **FLUX_CONTROLNETS}[name]
    if config["_class_name"].startswith("Flax"):
        out.mkdir(parents=True)
        write_json(out / "config.json", small(config))
        (out / "diffusion_flax_model.msgpack").write_bytes(b"flax")
        return out
    write_model(out, config, seed, variants)
    if "union-sdxl" in name:
        path = out / "diffusion_pytorch_model.safetensors"
        write_safetensors(path, {**draw(small(config), seed), **union_tensors(config.get("num_control_type", 6))})
    return out


def union_tensors(types: int) -> dict[str, np.ndarray]:
    """The tensors of a union ControlNet for SDXL that ControlNetModel lacks, whatever its config says."""
    width = 16  # of the first level
    times = 8  # of the embedding of a number
    shapes = {
        "task_embedding": (types, width), "spatial_ch_projs.weight": (width, width), "spatial_ch_projs.bias": (width,),
        "control_add_embedding.linear_1.weight": (64, types * times), "control_add_embedding.linear_1.bias": (64,),
        "control_add_embedding.linear_2.weight": (64, 64), "control_add_embedding.linear_2.bias": (64,),
        "transformer_layes.0.attn.in_proj_weight": (3 * width, width),
        "transformer_layes.0.attn.in_proj_bias": (3 * width,),
        "transformer_layes.0.attn.out_proj.weight": (width, width), "transformer_layes.0.attn.out_proj.bias": (width,),
        "transformer_layes.0.ln_1.weight": (width,), "transformer_layes.0.ln_1.bias": (width,),
        "transformer_layes.0.mlp.c_fc.weight": (4 * width, width), "transformer_layes.0.mlp.c_fc.bias": (4 * width,),
        "transformer_layes.0.mlp.c_proj.weight": (width, 4 * width), "transformer_layes.0.mlp.c_proj.bias": (width,),
        "transformer_layes.0.ln_2.weight": (width,), "transformer_layes.0.ln_2.bias": (width,),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    return {name: random_weight(rng, name, shape) for name, shape in shapes.items()}


if __name__ == "__main__":
    kinds = {
        **dict.fromkeys(NAMES, make),
        **dict.fromkeys(VAES, make_vae),
        **dict.fromkeys([*CONTROLNETS, *FLUX_CONTROLNETS], make_controlnet),
    }
    if len(sys.argv) != 3 or sys.argv[1] not in kinds:
        sys.exit("usage: real_pipelines.py NAME OUT\nnames: " + ", ".join(kinds))
    print(kinds[sys.argv[1]](sys.argv[1], Path(sys.argv[2])))
