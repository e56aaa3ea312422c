"""Writes a tiny pipeline with random weights, in the directory layout of the real one.

    python examples/tiny/make_tiny_pipeline.py flux|sd15|sdxl /tmp/tiny --seed 0

Expect 1.4 to 2.9 MB in about 4 seconds on a CPU: every file that FLUX.1-dev, Stable Diffusion 1.5 or Stable Diffusion
XL has (model_index.json, scheduler, VAE, text encoders with their tokenizers, transformer or UNet), each with the real
structure and the Hugging Face parameter names, but with a few narrow layers. mindone's pipelines and every training
script accept it in place of the real model, so that a command can be tried in seconds and without a download. Its
images are coloured noise. Stable Diffusion 1.5's safety checker is left out.

Equal seeds give equal bytes. OUT must be empty or not exist yet.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import string
import sys
from pathlib import Path

import numpy as np

# mindone and transformers take seconds to import. They are imported where they are used, so that --help and the check
# of OUT are immediate.

# Both tokenizers are trained on these: words of common captions and of the tests.
CAPTIONS = """
a photo of a red circle on a white background
a photo of a blue square on a black background
a photo of a green triangle on a yellow background
a drawing of a small dog with big eyes, sitting in the grass
a painting of a cat sleeping on a wooden chair, in the style of an old master
a picture of a toy robot standing on the table in a bright room
a close up photo of a person holding a cup of coffee in the morning light
a beautiful landscape with mountains, a river and an orange sky at sunset
the portrait of a young woman wearing a purple dress and a golden ring
two children playing with a ball on the beach, high quality, detailed
a street in the city at night, cars and people in the rain
an astronaut riding a horse on the moon, digital art, sharp focus
""".strip().splitlines()

# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


def make_clip_tokenizer(folder: Path, captions: list[str], **specials: str):
    """A CLIP tokenizer: the 512 byte symbols, so that any string has ids, and merges learned from the captions."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer
    from transformers.models.clip.tokenization_clip import bytes_to_unicode

    # Naming the word endings up front fixes their ids, which decide between pairs of the same count. Left to the
    # trainer they come in the order of a hash table, and the merges differ from run to run.
    endings = [c + "</w>" for c in string.ascii_lowercase + ","]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(vocab_size=320, special_tokens=endings, end_of_word_suffix="</w>", show_progress=False),
    )
    merges = [m.split() if isinstance(m, str) else m for m in json.loads(bpe.to_str())["model"]["merges"]]

    # CLIP's own order: bytes, bytes that end a word, merges, then the two specials. <|endoftext|> must be the largest
    # id: models whose config still says eos_token_id=2 pool at the largest id instead of at eos.
    symbols = list(bytes_to_unicode().values())
    symbols += [s + "</w>" for s in symbols]
    symbols += [a + b for a, b in merges] + ["<|startoftext|>", "<|endoftext|>"]

    folder.mkdir(parents=True)
    vocab_file = folder / "vocab.json"
    merges_file = folder / "merges.txt"
    write_json(vocab_file, {s: i for i, s in enumerate(symbols)})
    merges_file.write_text("\n".join(["#version: 0.2"] + [f"{a} {b}" for a, b in merges]) + "\n", encoding="utf-8")
    settings = {"model_max_length": 77, "do_lower_case": True, "clean_up_tokenization_spaces": True}
    tokenizer = CLIPTokenizer(str(vocab_file), str(merges_file), **settings, **specials)
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def make_t5_tokenizer(folder: Path, captions: list[str]):
    """A T5 tokenizer: a SentencePiece unigram model with byte fallback, and the same model as a tokenizer.json."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    spiece = train_sentencepiece(captions)
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(spiece)

    # The conversion in transformers drops the byte fallback (and needs protobuf), so tokenizer.json is built here.
    pieces = [*read_pieces(spiece), *((f"<extra_id_{i}>", 0.0) for i in reversed(range(100)))]
    fast = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    fast.normalizer = normalizers.Sequence(
        [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    )
    fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", prepend_scheme="always")])
    fast.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    tokenizer = T5TokenizerFast(
        str(folder / "spiece.model"), tokenizer_object=fast, model_max_length=512, clean_up_tokenization_spaces=True
    )
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def train_sentencepiece(captions: list[str]) -> bytes:
    """The bytes of a SentencePiece unigram model."""
    import sentencepiece

    # Candidates are only pieces that occur in two different words; with a comma a word counts as another one.
    words = sorted(set(" ".join(captions).replace(",", "").split()))
    text = captions + [f"{word}, {word}" for word in words]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        model_type="unigram",
        vocab_size=512,
        hard_vocab_limit=False,
        byte_fallback=True,
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        normalization_rule_name="identity",  # T5's NFKC table alone would be half a megabyte
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,  # sums in one order: the same bytes every time
        minloglevel=2,
    )
    return model.getvalue()


def read_pieces(spiece: bytes) -> list[tuple[str, float]]:
    """(piece, score) of every id."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    return [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]


# ----------------------------------------------------------------------------------------------------------------------
# Models


def random_weight(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight that keeps the scale of activations. Norm scales and biases are near 1 and 0, but not exactly: MindSpore
    initializes them to 1 and 0, so a loader that skips them would not be noticed."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith(".bias"):
        return 0.02 * noise
    if len(shape) == 1:
        return 1 + 0.02 * noise
    return noise / np.float32(np.sqrt(np.prod(shape[1:])))


def save_weights(cell, file: Path, rng: np.random.Generator, gains: dict[str, float]) -> None:
    """Writes random weights for the parameters of the cell; only their names and shapes are used."""
    from safetensors.numpy import save

    from mindtune.models.named_parameters import hf_name

    shapes = {hf_name(name): parameter.shape for name, parameter in cell.parameters_and_names()}
    # Sorted, so that the draws do not depend on the order in which the library creates its layers.
    tensors = {name: random_weight(rng, name, shapes[name]) for name in sorted(shapes)}
    for name, gain in gains.items():
        tensors[name] *= np.float32(gain)
    # transformers and mindone refuse a file without this entry; the files on the hub say "pt".
    file.write_bytes(save(tensors, metadata={"format": "pt"}))


def save_diffusers(model_class, config: dict, folder: Path, rng: np.random.Generator, **gains: float) -> None:
    cell = model_class(**config)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", hub_header(model_class.__name__) | config)
    save_weights(cell, folder / "diffusion_pytorch_model.safetensors", rng, gains)


def save_transformers(model_class, config, folder: Path, rng: np.random.Generator) -> None:
    cell = model_class(config)
    config.architectures = [model_class.__name__]
    config.torch_dtype = "float32"
    config.save_pretrained(str(folder))
    save_weights(cell, folder / "model.safetensors", rng, gains={})


def hub_header(class_name: str) -> dict:
    return {"_class_name": class_name, "_diffusers_version": "0.30.0.dev0"}  # the version FLUX.1-dev's files name


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# FLUX.1

WIDTH = 32  # of CLIP and T5: the transformer's pooled_projection_dim and joint_attention_dim

FLUX_COMPONENTS = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

FLUX_SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}

FLUX_TRANSFORMER = {
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 6, 6],  # sums to attention_head_dim
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": WIDTH,
    "num_attention_heads": 2,
    "num_layers": 2,
    "num_single_layers": 2,
    "patch_size": 1,
    "pooled_projection_dim": WIDTH,
}

FLUX_VAE = {
    "act_fn": "silu",
    "block_out_channels": [8, 16, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}


def make_flux(
    out: Path,
    seed: int = 0,
    captions: list[str] = CAPTIONS,
    transformer: dict | None = None,
    vae: dict | None = None,
    clip: dict | None = None,
    t5: dict | None = None,
) -> None:
    """Writes the pipeline to `out`. Raises FileExistsError if `out` is not empty.

    `captions` train the tokenizers; the dicts override entries of the four models' configs.
    """
    out = Path(out)
    rng = np.random.default_rng(seed)
    require_empty(out)

    from mindone.diffusers import AutoencoderKL, FluxTransformer2DModel
    from mindone.transformers import CLIPTextModel, T5EncoderModel

    clip_tokenizer = make_clip_tokenizer(out / "tokenizer", captions)
    t5_tokenizer = make_t5_tokenizer(out / "tokenizer_2", captions)
    save_transformers(CLIPTextModel, clip_config(clip_tokenizer, clip or {}), out / "text_encoder", rng)
    save_transformers(T5EncoderModel, t5_config(t5_tokenizer, t5 or {}), out / "text_encoder_2", rng)
    save_diffusers(FluxTransformer2DModel, FLUX_TRANSFORMER | (transformer or {}), out / "transformer", rng)
    # The decoder's last layer is normalized: its output would have a standard deviation of 1 and be clipped to [-1, 1].
    save_diffusers(AutoencoderKL, FLUX_VAE | (vae or {}), out / "vae", rng, **{"decoder.conv_out.weight": 0.5})

    (out / "scheduler").mkdir()
    scheduler_class = FLUX_COMPONENTS["scheduler"][1]
    write_json(out / "scheduler" / "scheduler_config.json", hub_header(scheduler_class) | FLUX_SCHEDULER)
    write_json(out / "model_index.json", hub_header("FluxPipeline") | FLUX_COMPONENTS)


def clip_config(tokenizer, changes: dict):
    from transformers import CLIPTextConfig

    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "projection_dim": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return CLIPTextConfig(
        **{**sizes, **changes},
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # where the model reads its pooled output
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_config(tokenizer, changes: dict):
    from transformers import T5Config

    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 2 * WIDTH, "num_layers": 2, "num_heads": 4}
    return T5Config(
        **{**sizes, **changes},
        vocab_size=len(tokenizer),
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Stable Diffusion 1.5 and XL

SD15_COMPONENTS = {
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SDXL_COMPONENTS = {
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
# The widths of the two text encoders. The UNet reads the concatenated states of both and the second's pooled output.
SDXL_WIDTHS = (WIDTH, WIDTH // 2)

SD15_SCHEDULER = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SDXL_SCHEDULER = {
    **SD15_SCHEDULER,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}

SD15_UNET = {
    "act_fn": "silu",
    "attention_head_dim": 2,  # the number of heads: the real configs misname it, too
    "block_out_channels": [16, 32, 32, 32],
    "center_input_sample": False,
    "cross_attention_dim": WIDTH,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 8,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SDXL_UNET = {
    **SD15_UNET,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "attention_head_dim": [2, 4, 4],
    "block_out_channels": [16, 32, 32],
    "cross_attention_dim": sum(SDXL_WIDTHS),
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "projection_class_embeddings_input_dim": SDXL_WIDTHS[1] + 6 * 8,  # pooled text, six numbers of size and crop
    "sample_size": 128,
    "transformer_layers_per_block": [1, 1, 2],
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "use_linear_projection": True,
}

SD15_VAE = {
    **{
        name: value
        for name, value in FLUX_VAE.items()
        if name not in ("shift_factor", "use_post_quant_conv", "use_quant_conv")
    },
    "force_upcast": False,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}


def make_sd15(
    out: Path, seed: int = 0, captions: list[str] = CAPTIONS, unet: dict | None = None, scheduler: dict | None = None
) -> None:
    """Writes the pipeline to `out`. Raises FileExistsError if `out` is not empty. The dicts override config entries."""
    clips = {"text_encoder": ("CLIPTextModel", {}, {})}
    index = hub_header("StableDiffusionPipeline") | SD15_COMPONENTS
    make_sd(
        Path(out),
        seed=seed,
        captions=captions,
        index=index,
        clips=clips,
        unet=SD15_UNET | (unet or {}),
        vae=SD15_VAE,
        scheduler=SD15_SCHEDULER | (scheduler or {}),
    )


def make_sdxl(
    out: Path, seed: int = 0, captions: list[str] = CAPTIONS, unet: dict | None = None, scheduler: dict | None = None
) -> None:
    """`make_sd15` for Stable Diffusion XL."""
    first, second = (
        {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width} for width in SDXL_WIDTHS
    )
    clips = {
        "text_encoder": ("CLIPTextModel", first, {}),
        "text_encoder_2": ("CLIPTextModelWithProjection", second, {"pad_token": "!"}),
    }
    index = hub_header("StableDiffusionXLPipeline") | SDXL_COMPONENTS | {"force_zeros_for_empty_prompt": True}
    vae = SD15_VAE | {"force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025}
    make_sd(
        Path(out),
        seed=seed,
        captions=captions,
        index=index,
        clips=clips,
        unet=SDXL_UNET | (unet or {}),
        vae=vae,
        scheduler=SDXL_SCHEDULER | (scheduler or {}),
    )


def make_sd(
    out: Path, seed: int, captions: list[str], index: dict, clips: dict, unet: dict, vae: dict, scheduler: dict
) -> None:
    """`clips`: name of a text encoder -> (class, config entries to override, special tokens of its tokenizer)."""
    rng = np.random.default_rng(seed)
    require_empty(out)

    import mindone.transformers
    from mindone.diffusers import AutoencoderKL, UNet2DConditionModel

    for name, (class_name, changes, specials) in clips.items():
        tokenizer = make_clip_tokenizer(out / name.replace("text_encoder", "tokenizer"), captions, **specials)
        save_transformers(getattr(mindone.transformers, class_name), clip_config(tokenizer, changes), out / name, rng)
    save_diffusers(UNet2DConditionModel, unet, out / "unet", rng)
    save_diffusers(AutoencoderKL, vae, out / "vae", rng, **{"decoder.conv_out.weight": 0.5})

    (out / "scheduler").mkdir()
    write_json(out / "scheduler" / "scheduler_config.json", hub_header(index["scheduler"][1]) | scheduler)
    write_json(out / "model_index.json", index)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def require_empty(out: Path) -> None:
    """Raises FileExistsError unless `out` is an empty directory or does not exist."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"OUT {out} exists and is not an empty directory: name a new one, or remove it first")


KINDS = {"flux": make_flux, "sd15": make_sd15, "sdxl": make_sdxl}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes a tiny pipeline with random weights.")
    parser.add_argument("kind", choices=sorted(KINDS), help="Pipeline to write.")
    parser.add_argument("out", metavar="OUT", type=Path, help="New or empty directory to write to.")
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed, 0 or more; equal seeds give equal bytes. Default: 0."
    )
    args = parser.parse_args(arguments)
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: must be 0 or more")

    os.environ.setdefault("GLOG_v", "3")  # MindSpore's errors only: building a model prints many deprecation warnings
    try:
        KINDS[args.kind](args.out, seed=args.seed)
    except FileExistsError as error:
        parser.error(str(error))  # exits with 2

    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"wrote a tiny {args.kind} pipeline to {args.out} (seed {args.seed}, {size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
