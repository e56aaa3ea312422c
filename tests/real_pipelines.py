"""Tiny pipelines with the files, keys and tensor names of published ones: only the sizes are small.

    python tests/real_pipelines.py stable-diffusion-v1-5 /tmp/sd15

Class names, null entries, absent keys, schedulers, tokenizer files, names and types of the weight files and the old names of their
tensors are those of the hub (tests/real_configs.py); weights are random. Of what no script reads (safety checker, single files,
pickles) the names are there, not the content.
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
# The two text encoders of SDXL are read side by side: 32 + 16 = 48; the second's 16 and six numbers of 8 make 64.
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
    # The head's 128 numbers stay: where a transformer's config does not say how its positions share them, they are 16, 56 and 56.
    "num_attention_heads": {12: 2, 16: 2, 20: 2, 24: 1},
    "num_layers": {19: 1, 24: 2, 2: 1, 5: 1, 6: 1},
    "num_single_layers": {38: 1, 10: 1},
    "joint_attention_dim": {4096: 32},
    "pooled_projection_dim": {768: 32},
    "d_model": {4096: 32}, "d_kv": {64: 8}, "d_ff": {10240: 64}, "num_heads": {64: 4}, "num_decoder_layers": {24: 2},
}  # fmt: skip


def frozen(value):
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def small(config: dict) -> dict:
    """A model's config at a small size: the same keys, and the same values but for the sizes."""
    made = {key: SMALL.get(key, {}).get(frozen(value), value) for key, value in config.items()}
    if config.get("_class_name") == "AutoencoderKL":
        if "norm_num_groups" in made:
            made["norm_num_groups"] = 4
        else:  # diffusers' default is 32 groups
            made["block_out_channels"] = [32] * 4
    if isinstance(config.get("reverse_transformer_layers_per_block"), list):
        made["layers_per_block"] = config["layers_per_block"]  # the lists name each layer
    if config.get("model_type") == "clip_text_model":
        made["vocab_size"] = vocabulary("CLIP")
    if config.get("model_type") == "t5":
        made["vocab_size"] = vocabulary("T5") + 28  # the real one has as many rows beyond the tokenizer's
    return made


# ---- tokenizers ----------------------------------------------------------------------------------


@cache
def tokenizer_files(kind: str) -> dict[str, bytes]:
    """What a tokenizer of CLIP or T5 is made of, trained on the tiny pipelines' captions."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tokenizer"
        (make_clip_tokenizer if kind == "CLIP" else make_t5_tokenizer)(out, CAPTIONS)
        names = ("vocab.json", "merges.txt") if kind == "CLIP" else ("spiece.model", "tokenizer.json")
        return {name: (out / name).read_bytes() for name in names}


@cache
def token_numbers(kind: str) -> dict[str, int]:
    """Every token's id."""
    files = tokenizer_files(kind)
    if kind == "CLIP":
        return json.loads(files["vocab.json"])
    whole = json.loads(files["tokenizer.json"])
    numbers = {piece: number for number, (piece, _) in enumerate(whole["model"]["vocab"])}
    return {**numbers, **{token["content"]: token["id"] for token in whole["added_tokens"]}}


def vocabulary(kind: str) -> int:
    return 1 + max(token_numbers(kind).values())


def write_tokenizer(folder: Path, config: dict, special: dict, model_max_length: bool = True) -> None:
    """Published files around a small vocabulary; added_tokens_decoder gets its ids."""
    kind = "CLIP" if config["tokenizer_class"].startswith("CLIP") else "T5"
    folder.mkdir(parents=True)
    for name, content in tokenizer_files(kind).items():
        (folder / name).write_bytes(content)
    config = {key: value for key, value in config.items() if model_max_length or key != "model_max_length"}
    if "added_tokens_decoder" in config:
        tokens, numbers = config["added_tokens_decoder"].values(), token_numbers(kind)
        config["added_tokens_decoder"] = {str(numbers[token["content"]]): token for token in tokens}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)


# ---- weights -------------------------------------------------------------------------------------


def parameter_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name in today's files -> shape, of the model that a config.json describes."""
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
            cell = cls(
                **{key: value for key, value in config.items() if not key.startswith("_") and key != "num_control_type"}
            )
    return {hf_name(name): tuple(parameter.shape) for name, parameter in cell.parameters_and_names()}


def draw(config: dict, seed: int) -> dict[str, np.ndarray]:
    """Random float32 weights by today's names, in the order of their names."""
    rng, shapes = np.random.default_rng(seed), parameter_shapes(config)
    tensors = {name: random_weight(rng, name, shapes[name]) for name in sorted(shapes)}
    if "decoder.conv_out.weight" in tensors:
        tensors["decoder.conv_out.weight"] *= np.float32(0.5)  # within [-1, 1] nearly everywhere
    return tensors


def version(config: dict, key: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", config[key])[:2])


def old_names(tensors: dict, shape: str = "matrix") -> dict[str, np.ndarray]:
    """A VAE's attention as diffusers before 0.17 named it, [C, C]; `shape` "convolution": [C, C, 1, 1], of converted checkpoints."""
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
    """The tensors under the names of the published files, in their types, with those that today's models do not have."""
    dtype = np.float16 if variant == "fp16" else np.float32
    flux = config.get("_class_name", "").startswith("Flux") or config.get("latent_channels") == 16
    if flux or config.get("torch_dtype") == "bfloat16":
        dtype = ml_dtypes.bfloat16
    made = {name: value.astype(dtype) for name, value in tensors.items()}
    if (
        config.get("_class_name") == "AutoencoderKL"
        and variant != "fp16"
        and version(config, "_diffusers_version") < (0, 17)
    ):
        made = old_names(made)
    if config.get("model_type") == "clip_text_model" and version(config, "transformers_version") < (4, 31):
        made["text_model.embeddings.position_ids"] = np.arange(77, dtype=np.int64)[None]
    return made


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """One file, in the order given. The library's own writer does not know every type."""
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name, value in tensors.items():
        begin, end = end, end + value.nbytes
        entries[name] = {"dtype": TYPES[value.dtype.name], "shape": list(value.shape), "data_offsets": [begin, end]}
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    data = b"".join(np.ascontiguousarray(value).tobytes() for value in tensors.values())
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)


def write_weights(folder: Path, stem: str, tensors: dict[str, np.ndarray], variant: str = "", shards: int = 1) -> None:
    """One file, or `shards` of about the same number of tensors with their index, under the names that the libraries give them."""
    middle = f".{variant}" if variant else ""
    if shards == 1:
        return write_safetensors(folder / f"{stem}{middle}.safetensors", tensors)
    weight_map, names = {}, list(tensors)
    for number in range(shards):
        name = f"{stem}{middle}-{number + 1:05d}-of-{shards:05d}.safetensors"
        own = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        write_safetensors(folder / name, {each: tensors[each] for each in own})
        weight_map.update(dict.fromkeys(own, name))
    total = sum(value.nbytes for value in tensors.values())
    write_json(
        folder / f"{stem}.safetensors.index{middle}.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def write_model(folder: Path, config: dict, seed: int, variants=("",), shards: int = 1) -> None:
    """config.json and weights of one model, `config` at its published size."""
    config = small(config)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    tensors = draw(config, seed)
    for variant in variants:
        stem = "model" if "architectures" in config else "diffusion_pytorch_model"
        write_weights(folder, stem, as_published(config, tensors, variant), variant, shards)


# ---- what is asked for ---------------------------------------------------------------------------

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
    """The pipeline `name` in the new folder `out`, about 2 MB.

    `variants`: which weight files there are, "" and "fp16"; `shards`: part -> number of files, of FLUX the published ones; `extras`: the
    pickles, second copies and single files that lie beside the weights on the hub; `model_max_length` False: tokenizers that do not say.
    """
    out, files = Path(out), PIPELINES[name]
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
    """Files that a script has to leave alone: each is torn, so that reading it fails."""
    for folder in sorted(path.parent for path in out.glob("*/config.json")):
        stem = "model" if folder.name.startswith(("text_encoder", "safety_checker")) else "diffusion_pytorch_model"
        (folder / f"{stem.replace('model', 'pytorch_model') if stem == 'model' else stem}.bin").write_bytes(
            pickle.dumps("torn")
        )
        (folder / f"{stem}.non_ema.safetensors").write_bytes(b"torn")
        (folder / "flax_model.msgpack").write_bytes(b"torn")
        (folder / "model.onnx").write_bytes(b"torn")
    for name in (f"{single}.safetensors", f"{single}.ckpt"):
        (out / name).write_bytes(b"torn")


def make_vae(name: str, out: Path, seed: int = 0, variants=("",)) -> Path:
    write_model(Path(out), VAES[name], seed, variants)
    return Path(out)


def make_controlnet(name: str, out: Path, seed: int = 0, variants=("",)) -> Path:
    """A published ControlNet, small, for the small pipeline of its base."""
    out, config = Path(out), {**CONTROLNETS, **FLUX_CONTROLNETS}[name]
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
    """What the file of a union ControlNet for SDXL has beyond ControlNetModel, whatever its config says."""
    width, times = 16, 8  # of the first level, and of a number's sinusoids
    shapes = {
        "task_embedding": (types, width), "spatial_ch_projs.weight": (width, width), "spatial_ch_projs.bias": (width,),
        "control_add_embedding.linear_1.weight": (64, types * times), "control_add_embedding.linear_1.bias": (64,),
        "control_add_embedding.linear_2.weight": (64, 64), "control_add_embedding.linear_2.bias": (64,),
        "transformer_layes.0.attn.in_proj_weight": (3 * width, width), "transformer_layes.0.attn.in_proj_bias": (3 * width,),
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
