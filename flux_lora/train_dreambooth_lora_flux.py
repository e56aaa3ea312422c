"""DreamBooth LoRA for FLUX.1 on MindSpore: teaches a few pictures of a subject to a small adapter.

    python train_dreambooth_lora_flux.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev \\
        --instance_data_dir photos/ --instance_prompt "a photo of sks dog" --output_dir out \\
        --mixed_precision bf16 --resolution 512 --train_batch_size 1 --cache_latents --max_train_steps 500

Leaves out/pytorch_lora_weights.safetensors, checkpoints, samples/*.png, loss curves for TensorBoard, metrics.jsonl and run.json.
Ctrl-C saves a checkpoint; the same command with --resume_from_checkpoint latest goes on, bit for bit on the CPU.
"""

import argparse
import itertools
import json
import math
import secrets
import time
from functools import partial
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import ops
from tqdm import tqdm

from mindtune import files, flow, rng
from mindtune.cli import StopRequest, UserError, check_flags, run, shown, tell
from mindtune.data import buckets, checks, columns, crops, folders, grids, metadata, order, tables
from mindtune.distributed import ranks
from mindtune.encode.cache import encoder_fingerprint
from mindtune.encode.encoder_stage import ClassImageRequest, EncoderStage
from mindtune.encode.text_encoders import clip_pooled, token_ids
from mindtune.models import configs, execution, library, loading, lora, pipelines, precision, sampling
from mindtune.models.weights import linear_layers, weight_files
from mindtune.optim import advice, optimizers, schedules, zero1
from mindtune.run import checkpoint, hub, memory, plan, report, tracking
from mindtune.run.evaluation import HELD_OUT_INDICES, held_out_loss

# ---- flags ---------------------------------------------------------------------------------------

# CUDA switches that a diffusers command may carry, and what this backend does anyway.
ACCEPTED = {
    "allow_tf32": "a CUDA setting; this backend's matrix products run in the type --mixed_precision names",
    "enable_xformers_memory_efficient_attention": "a CUDA kernel; on Ascend mindone uses its own flash attention without a flag",
    "enable_npu_flash_attention": "mindone uses flash attention on Ascend without a flag",
}


def boolean(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument

    # Model
    add("--pretrained_model_name_or_path", required=True, help="Directory of a FLUX.1 pipeline, or a hub id.")
    add("--revision", help="Branch, tag or commit on the hub. Default: main.")
    add("--variant", help="Variant of the weight files, such as fp16. Default: none.")
    add("--lora_model_name_or_path", help="A LoRA to go on from (file or directory). Default: a new one.")
    add(
        "--cache_dir",
        help="Where hub downloads and encoder outputs are kept. Default: the hub's cache, and <output_dir>/cache.",
    )
    add(
        "--mindspore_mode",
        type=int,
        choices=[0, 1],
        default=0,
        help="0 compiles the step to a graph, 1 runs it in PyNative.",
    )
    # Data
    add(
        "--instance_data_dir",
        help="Directory of the subject's images; captions in metadata.jsonl or .csv, or beside them as .txt.",
    )
    add("--dataset_name", help="Instead: a data set for the datasets library, a hub id or a local directory.")
    add("--dataset_config_name", help="Configuration of that data set. Default: its only one.")
    add("--image_column", help="Its column of pictures. Default: the first image column.")
    add(
        "--caption_column",
        help="Its column (or the one in metadata) of captions. Default: --instance_prompt, or text in metadata.",
    )
    add(
        "--instance_prompt",
        help="Prompt of every picture without a caption of its own, with a rare word for the subject.",
    )
    add("--max_train_samples", type=int, help="Use the first so many pictures. Default: all.")
    add("--repeats", type=int, default=1, help="Uses of every picture in an epoch.")
    add("--skip_bad_images", action="store_true", help="Go on without unreadable or too small pictures, listing them.")
    add(
        "--validation_split",
        type=float,
        default=0.0,
        help="Share of the pictures kept out of training to measure their loss; 0: none.",
    )
    add(
        "--resolution", type=int, default=512, help="Side of the square that is trained on, in pixels; divisible by 16."
    )
    add(
        "--aspect_ratio_buckets",
        help='Instead: heights and widths to choose from for every picture, "672,1568;1024,1024".',
    )
    add("--center_crop", action="store_true", help="Crop centrally. Default: a fresh random crop for every use.")
    add("--random_flip", action="store_true", help="Mirror half of the uses, drawn afresh.")
    add(
        "--image_interpolation_mode",
        choices=sorted(crops.INTERPOLATIONS),
        default="lanczos",
        help="Filter for resizing.",
    )
    add("--cache_latents", action="store_true", help="Encode the pictures once, centre-cropped, one entry a flip.")
    add("--dataloader_num_workers", type=int, default=1, help="Threads that make batches ahead of the step; 0: none.")
    add("--max_sequence_length", type=int, default=512, help="T5 tokens of a prompt, at most 512.")
    # Prior preservation
    add(
        "--with_prior_preservation",
        action="store_true",
        help="Train class pictures along, so that the class keeps its look.",
    )
    add("--class_data_dir", help="Directory of class pictures; filled up to --num_class_images by the base model.")
    add("--class_prompt", help="Prompt of the class pictures without a caption of their own.")
    add("--num_class_images", type=int, default=100, help="Class pictures wanted.")
    add("--prior_loss_weight", type=float, default=1.0, help="Weight of the class pictures' loss.")
    add("--sample_batch_size", type=int, default=4, help="Class pictures made at a time.")
    add(
        "--prior_generation_precision",
        choices=["no", "fp32", "fp16", "bf16"],
        help="Their precision. Default: --mixed_precision.",
    )
    # LoRA
    add("--lora_rank", "--rank", type=int, default=4, help="Rank of the low-rank layers.")
    add("--lora_alpha", type=float, help="Their scale is alpha/rank. Default: the rank.")
    add("--lora_dropout", type=float, default=0.0, help="Dropout before them; above 0 a resumed run draws other masks.")
    add(
        "--lora_layers",
        help="Comma-separated ends of layer names. Default: " + ",".join(lora.TRANSFORMER_TARGETS) + ".",
    )
    add("--train_text_encoder", action="store_true", help="Adapt CLIP too (T5 stays frozen).")
    # Step
    add(
        "--weighting_scheme",
        choices=flow.WEIGHTING_SCHEMES,
        default="none",
        help="Density of timesteps and weight of their loss.",
    )
    add("--logit_mean", type=float, default=0.0, help="Mean, for logit_normal.")
    add("--logit_std", type=float, default=1.0, help="Standard deviation, for logit_normal.")
    add("--mode_scale", type=float, default=1.29, help="Scale, for mode.")
    add(
        "--timestep_shift",
        default="1",
        help="Shift training towards noise: a factor, or auto for the resolution's. 1: as FLUX.1-dev.",
    )
    add(
        "--guidance_scale",
        type=float,
        default=3.5,
        help="Guidance given to a guidance-distilled transformer, training and sampling.",
    )
    add(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        default="no",
        help="Type of frozen weights and of computation.",
    )
    add(
        "--base_precision",
        choices=["same", "int8"],
        default="same",
        help="int8: the frozen transformer and T5 in one byte a weight.",
    )
    add(
        "--gradient_checkpointing",
        action="store_true",
        help="Recompute the blocks in the backward pass to save memory.",
    )
    add(
        "--train_batch_size",
        type=int,
        default=4,
        help="Pictures a step and worker (with class pictures: of each kind).",
    )
    add("--gradient_accumulation_steps", type=int, default=1, help="Steps an update.")
    add("--num_train_epochs", type=int, default=1, help="Passes over the pictures.")
    add("--max_train_steps", type=int, help="Updates in all; overrides the epochs.")
    add("--seed", type=int, help="Seed of everything random. Default: drawn, and written to run.json.")
    add(
        "--zero_stage",
        type=int,
        choices=[0, 1, 2, 3],
        default=0,
        help="1: share the optimizer's state out over the workers.",
    )
    add(
        "--distributed",
        action="store_true",
        help="Train on several devices at once, as one of the workers that msrun starts.",
    )
    # Optimizer
    add(
        "--optimizer",
        type=str.lower,
        choices=["adamw", "adamweightdecay", "prodigy", "adafactor"],
        default="adamw",
        help="AdamW has bias correction, AdamWeightDecay is MindSpore's without; adafactor reads no --adam_ flag but the decay.",
    )
    add(
        "--use_8bit_adam",
        action="store_true",
        help="AdamW with moments in 8 bits: 2 bytes of state a parameter instead of 8.",
    )
    add(
        "--offload_optimizer",
        action="store_true",
        help="AdamW's moments in the host's memory, updated there; graph mode only.",
    )
    add("--learning_rate", type=float, default=1e-4, help="Base rate; for prodigy about 1.")
    add("--text_encoder_lr", type=float, default=5e-6, help="Base rate for CLIP.")
    add("--scale_lr", action="store_true", help="Multiply --learning_rate by batch size, accumulation and workers.")
    add("--lr_scheduler", choices=schedules.SCHEDULES, default="constant", help="Course of the rate.")
    add("--lr_warmup_steps", type=int, default=500, help="Updates of warm-up (all schedules but constant).")
    add(
        "--lr_schedule_steps",
        type=int,
        help="Updates over which the schedule runs, warm-up included. Default: those of the run.",
    )
    add("--lr_num_cycles", type=float, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=float, default=1.0, help="Power of polynomial.")
    add("--adam_beta1", type=float, default=0.9, help="Decay of the first moment.")
    add("--adam_beta2", type=float, default=0.999, help="Decay of the second moment.")
    add("--adam_epsilon", type=float, default=1e-8, help="Added to the root of the second moment.")
    add("--adam_weight_decay", type=float, default=1e-4, help="Decoupled weight decay.")
    add("--adam_weight_decay_text_encoder", type=float, default=1e-3, help="The same for CLIP.")
    add("--prodigy_beta3", type=float, help="Decay of prodigy's estimate. Default: the root of beta2.")
    add("--prodigy_decouple", type=boolean, default=True, help="Decay weights as AdamW does.")
    add("--prodigy_use_bias_correction", type=boolean, default=True, help="Adam's bias correction.")
    add(
        "--prodigy_safeguard_warmup",
        type=boolean,
        default=True,
        help="Keep the warm-up's small rates out of the estimate.",
    )
    add("--max_grad_norm", type=float, default=1.0, help="Clip the gradients' norm; 0: no clipping.")
    # Output
    add("--output_dir", default="flux-dreambooth-lora", help="Directory for everything that the run leaves.")
    add("--overwrite_output_dir", action="store_true", help="Remove another run's files there first.")
    add("--checkpointing_steps", type=int, default=500, help="Updates between checkpoints.")
    add("--checkpoints_total_limit", type=int, help="Keep the newest so many. Default: all.")
    add("--resume_from_checkpoint", help="latest, a checkpoint's name in the output directory, or its path.")
    add(
        "--upcast_before_saving",
        action="store_true",
        help="Final adapter in float32. Default: in the type of computation.",
    )
    add("--logging_dir", default="logs", help="TensorBoard's directory, inside the output directory.")
    add(
        "--report_to",
        choices=["tensorboard", "wandb", "swanlab", "all", "none"],
        default="tensorboard",
        help="Where curves go, besides metrics.jsonl; all: those that are installed and logged in.",
    )
    add("--validation_prompt", nargs="+", default=[], help="Prompts to draw while training and at the end.")
    add("--num_validation_images", type=int, default=4, help="Pictures a prompt.")
    add("--num_inference_steps", type=int, default=28, help="Steps of sampling, for validation and class pictures.")
    add("--validation_epochs", type=int, default=50, help="Epochs between validations.")
    add("--push_to_hub", action="store_true", help="Upload the adapter with a model card when the run is done.")
    add("--hub_token", help="Token with write access; written nowhere. Default: HF_TOKEN, or that of the last login.")
    add("--hub_model_id", help="Repository to upload to. Default: the output directory's name, in your account.")
    add("--dry_run", action="store_true", help="Print the memory plan and end; reads configs only, writes nothing.")
    add(
        "--device_memory_gb",
        type=float,
        default=64,
        help="Memory of the device that the plan shall fit, such as 64 or 32 on Ascend.",
    )
    # Reference flags of other backends
    for name, why in ACCEPTED.items():
        add(f"--{name}", action="store_true", help=f"Accepted: {why}.")

    args = parser.parse_args(argv)
    check_args(args)
    return args


def memory_settings(args, root):
    """What determines the memory of the run."""
    return memory.Settings(
        system="flux_lora",
        root=root,
        mixed_precision=args.mixed_precision,
        mindspore_mode=args.mindspore_mode,
        resolution=args.resolution,
        aspect_ratio_buckets=args.aspect_ratio_buckets,
        train_batch_size=args.train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        gradient_checkpointing=args.gradient_checkpointing,
        cache_latents=args.cache_latents,
        optimizer=args.optimizer,
        use_8bit_adam=args.use_8bit_adam,
        offload_optimizer=args.offload_optimizer,
        base_precision=args.base_precision,
        max_sequence_length=args.max_sequence_length,
        lora_rank=args.lora_rank,
        lora_layers=args.lora_layers,
        train_text_encoder=args.train_text_encoder,
        with_prior_preservation=args.with_prior_preservation,
    )


def check_args(args):
    """Refuses what cannot work, before anything is read or written. Raises UserError."""
    at_least = {
        "lora_rank": 1,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "repeats": 1,
    }
    at_least.update(
        checkpointing_steps=1, validation_epochs=1, num_validation_images=1, num_inference_steps=1, sample_batch_size=1
    )
    at_least.update(
        max_train_steps=1,
        lr_schedule_steps=1,
        checkpoints_total_limit=1,
        max_train_samples=1,
        max_sequence_length=1,
        device_memory_gb=1,
        num_class_images=1,
    )
    at_least.update(
        learning_rate=0, text_encoder_lr=0, max_grad_norm=0, lora_dropout=0, lr_warmup_steps=0, dataloader_num_workers=0
    )
    at_least.update(validation_split=0, adam_beta1=0, adam_beta2=0)
    check_flags(vars(args), ACCEPTED, at_least, ("validation_split", "lora_dropout", "adam_beta1", "adam_beta2"))
    optimizers.check_state_flags(args.optimizer, args.use_8bit_adam, args.offload_optimizer, args.mindspore_mode == 0)
    zero1.check_flags(args.zero_stage, args.distributed, args.optimizer)

    if bool(args.instance_data_dir) == bool(args.dataset_name):
        raise UserError("give either --instance_data_dir (a directory of pictures) or --dataset_name, one of the two.")
    if args.instance_data_dir:
        for name in ("dataset_config_name", "image_column"):
            if getattr(args, name):
                raise UserError(
                    f"--{name} {getattr(args, name)}: belongs to --dataset_name; leave it out with --instance_data_dir."
                )
        folder = Path(args.instance_data_dir)
        if args.caption_column and folder.is_dir() and not metadata.metadata_file(folder):
            raise UserError(
                f"--caption_column {args.caption_column}: {folder} has no metadata.jsonl or metadata.csv to read it from."
            )
    if args.class_prompt and not args.class_data_dir:
        raise UserError(
            "--class_prompt without --class_data_dir: name the directory where class pictures are or shall be kept."
        )
    if args.with_prior_preservation and not (args.class_data_dir and args.class_prompt):
        raise UserError("--with_prior_preservation needs --class_data_dir and --class_prompt.")
    if args.class_data_dir and not args.with_prior_preservation:
        print("--class_data_dir and --class_prompt do nothing without --with_prior_preservation")
    if args.resolution % 16 or args.resolution < 16:
        near = max(16, round(args.resolution / 16) * 16)
        raise UserError(
            f"--resolution {args.resolution}: must be divisible by 16 (VAE 8, patches 2). The nearest is {near}."
        )
    if args.max_sequence_length > 512:
        raise UserError(
            f"--max_sequence_length {args.max_sequence_length}: T5 was trained on at most 512 tokens here; use 512 or less."
        )
    if args.lora_alpha is not None and not args.lora_alpha > 0:
        raise UserError(f"--lora_alpha {args.lora_alpha}: must be above 0; at 0 the adapter does nothing.")
    if args.timestep_shift != "auto":
        try:
            usable = 0 < float(args.timestep_shift) < math.inf
        except ValueError:
            usable = False
        if not usable:
            raise UserError(f"--timestep_shift {args.timestep_shift}: give a positive factor or auto.")


# ---- data ----------------------------------------------------------------------------------------


def load_samples(args, sizes):
    """Every usable picture with its caption, checked to the last pixel row. Raises UserError."""
    if args.dataset_name:
        flag = f"--dataset_name {shown(args.dataset_name)}"
        samples = tables.samples_in_dataset(
            columns.Source(
                args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir, image_column=args.image_column,
                caption_column=args.caption_column,
            )
        )  # fmt: skip
    else:
        flag = f"--instance_data_dir {shown(args.instance_data_dir)}"
        samples = folders.samples_in_folder(args.instance_data_dir, "--instance_data_dir", args.caption_column)
    samples = samples[: args.max_train_samples]
    samples = checks.preflight(
        samples, buckets.min_size(sizes), flag, args.skip_bad_images, args.dataloader_num_workers
    )
    bare = [sample.name for sample in samples if sample.caption is None]
    if bare and args.instance_prompt is None:
        raise UserError(
            f"{len(bare)} pictures have no caption ({bare[0]} ...): give --instance_prompt, or a .txt file beside each."
        )
    for sample in samples:
        sample.caption = args.instance_prompt if sample.caption is None else sample.caption
    return samples


def class_shares(args, numbers):
    """How many class pictures the bucket of every instance picture in `numbers` gets: --num_class_images as those are shared out."""
    found, counts = np.unique(numbers, return_counts=True)
    return {int(k): max(1, round(args.num_class_images * n / len(numbers))) for k, n in zip(found, counts)}


def class_samples(args, sizes, shares, say=print):
    """The usable class images that are there, of every bucket in `shares` at most so many, maybe none yet. Raises UserError."""
    folder = Path(args.class_data_dir)
    if folders.holds_no_image(folder, "--class_data_dir"):
        return [], np.array([], int)
    samples = folders.samples_in_folder(args.class_data_dir, "--class_data_dir", say=say)
    for sample in samples:
        sample.caption = sample.caption or args.class_prompt
    used, flag = [sizes[k] for k in shares], f"--class_data_dir {shown(folder)}"
    samples = checks.preflight(samples, buckets.min_size(used), flag, args.skip_bad_images, args.dataloader_num_workers)
    numbers = np.array(list(shares))[buckets.bucket_ids(samples, used)]
    places = [place for place, k in enumerate(numbers) if np.count_nonzero(numbers[:place] == k) < shares[k]]
    return [samples[place] for place in places], numbers[places]


def make_class_images(args, root, seed, sizes, shares, have):
    """The class pictures that are missing, in a process of their own. Their numbers name their noise: go on after the last one."""
    folder, stage = (
        Path(args.class_data_dir),
        make_stage(args, root, args.prior_generation_precision or args.mixed_precision),
    )
    folder.mkdir(parents=True, exist_ok=True)
    for bucket, share in shares.items():
        missing, size = share - int(np.count_nonzero(have == bucket)), sizes[bucket]
        if missing > 0:
            print(f"class images of {size[1]}x{size[0]}: {share - missing} of {share} in {folder}; making {missing}")
            first = max((int(path.name[:5]) + 1 for path in folder.glob("[0-9]" * 5 + "-*.png")), default=0)
            order = ClassImageRequest(folder, args.class_prompt, first, first + missing, args.sample_batch_size, seed, size)
            order.steps, order.guidance_scale = args.num_inference_steps, args.guidance_scale
            stage.generate(order)


def make_stage(args, root, kind):
    folder = Path(args.cache_dir, "mindtune") if args.cache_dir else Path(args.output_dir, "cache")
    int8 = args.base_precision == "int8"
    return EncoderStage(root, args.variant, kind, folder, args.max_sequence_length, args.image_interpolation_mode, int8=int8)


class Batches:
    """Numpy batches by position: a pure function of seed, sample ids and use counts.

    A batch is [instances; class pictures] of one bucket; images [B, 2C, h, w] (cached moments) or [B, 3, H, W] (pixels), posterior
    noise and noise [B, C, h, w], index [B], prompt_embeds [B, L, D], pooled_prompt_embeds [B, P] or CLIP's token ids [B, 77], and the
    bucket's image ids [T, 3]. `latent` is (channels, pixels a latent), samples of each kind come with the numbers of their buckets.
    """

    def __init__(
        self, args, seed, stage, sizes, samples, class_samples, held_out, latent, num_train_timesteps, tokenizer=None
    ):
        self.args, self.seed, self.stage, self.tokenizer, self.sizes = args, seed, stage, tokenizer, sizes
        self.samples, self.class_samples, self.held_out_samples = samples[0], class_samples[0], list(zip(*held_out))
        self.latent, self.num_train_timesteps = latent, num_train_timesteps
        stream = "{} {}" if len(sizes) > 1 else "{}"
        self.order = buckets.BucketOrder(
            seed, samples[1], args.train_batch_size, stream.format("instance", "{}"), args.repeats
        )
        self.class_ids = {k: np.flatnonzero(class_samples[1] == k) for k in self.order.buckets if self.class_samples}
        self.class_streams = {
            k: rng.SampleStream(seed, stream.format("class", k), len(ids)) for k, ids in self.class_ids.items()
        }
        self.epoch_length = max(self.order.epoch_length, len(self.class_samples))

    def at(self, batch):
        """Batch number `batch` of all workers together, from the start of the run."""
        which, first = self.order.place(batch)
        bucket, uses = self.order.buckets[which], self.order.uses(which, first)
        size = self.sizes[bucket]
        rows = [self._row("instance", self.samples[sample_id], sample_id, use, size) for sample_id, use in uses]
        for position in range(first, first + len(uses)) if self.class_samples else ():
            place, use = self.class_streams[bucket].at(position)
            sample_id = int(self.class_ids[bucket][place])
            rows.append(self._row("class", self.class_samples[sample_id], sample_id, use, size))
        return *(np.stack(column) for column in zip(*rows)), flow.latent_image_ids(*self.latent_shape(size)[1:])

    def latent_shape(self, size):
        channels, factor = self.latent
        return channels, size[0] // factor, size[1] // factor

    def _row(self, kind, sample, sample_id, use, size):
        args, seed, shape = self.args, self.seed, self.latent_shape(size)
        crop = rng.generator(seed, f"{kind} crop and flip", sample_id, use).random(3)
        flip = bool(args.random_flip and crop[2] < 0.5)
        if args.cache_latents:
            image = self.stage.moments(sample, size, flip)
        else:
            place = None if args.center_crop else (crop[0], crop[1])
            image = crops.pixel_values(sample.open(), size, args.image_interpolation_mode, place, flip)
        u = flow.sample_density(
            rng.generator(seed, f"{kind} timestep", sample_id, use),
            args.weighting_scheme,
            args.logit_mean,
            args.logit_std,
            args.mode_scale,
        )
        index = np.int32(flow.density_to_index(u, self.num_train_timesteps))
        posterior = rng.normal(seed, f"{kind} posterior", sample_id, use, shape=shape)
        noise = rng.normal(seed, f"{kind} noise", sample_id, use, shape=shape)
        return image, posterior, noise, index, *self._text(sample.caption)

    def held_out(self, sample_id, index):
        """A batch of one held-out picture, always with the same draws for the same index."""
        sample, bucket = self.held_out_samples[sample_id]
        size, shape = self.sizes[bucket], self.latent_shape(self.sizes[bucket])
        if self.args.cache_latents:
            image = self.stage.moments(sample, size, False)
        else:
            image = crops.pixel_values(sample.open(), size, self.args.image_interpolation_mode)
        posterior = rng.normal(self.seed, "held-out posterior", sample_id, shape=shape)
        noise = rng.normal(self.seed, "held-out noise", sample_id, index, shape=shape)
        row = image, posterior, noise, np.int32(index), *self._text(sample.caption)
        return *(np.stack([column]) for column in row), flow.latent_image_ids(*shape[1:])

    def _text(self, caption):
        text = self.stage.text(caption)
        if self.tokenizer is None:
            return text["prompt_embeds"], text["pooled_prompt_embeds"]
        return text["prompt_embeds"], token_ids(self.tokenizer, caption, self.tokenizer.model_max_length).astype(
            np.int32
        )


# ---- the step ------------------------------------------------------------------------------------


class TrainStepForFluxDevDB(library.TrainStep):
    """One micro-batch: loss, gradients and, every `gradient_accumulation_steps` calls, an update. A pure function of its inputs.

    `vae` is given if the images come as pixels, `text_encoder` if CLIP trains. Calling it gives (scaled loss, loss), scalars.
    """

    def __init__(self, transformer, optimizer, noise_scheduler, compute_dtype, args, latent_config, text_ids, vae=None,
                 text_encoder=None, loss_scaler=None):  # fmt: skip
        super().__init__(
            transformer,
            optimizer,
            loss_scaler=loss_scaler,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            # Batches run on across epochs, so there is no end of the loader at which to cut an update short.
            gradient_accumulation_kwargs={"sync_with_dataloader": False},
        )
        self.grad_clipper = precision.GradNormClipper(args.max_grad_norm)
        self.transformer, self.vae, self.text_encoder = self.model, vae, text_encoder
        self.compute_dtype = compute_dtype
        # Configs are dicts, which a graph cannot read by attribute: take out what forward needs.
        self.latent_shift, self.latent_scale = flow.scale_constants(latent_config)
        self.guidance_embeds = transformer.config["guidance_embeds"]
        self.sigmas = noise_scheduler["sigmas"]
        self.text_ids = text_ids
        self.args = flow.AttrJitWrapper(
            weighting_scheme=args.weighting_scheme,
            with_prior_preservation=args.with_prior_preservation,
            prior_loss_weight=args.prior_loss_weight,
            guidance_scale=args.guidance_scale,
        )

    def predict(self, images, posterior_noise, noise, indices, prompt_embeds, pooled_prompt_embeds, image_ids):
        """Prediction and target [B, C, h, w] float32, and sigmas [B, 1, 1, 1]."""
        if self.vae is not None:
            images = self.vae.encode(images.to(self.compute_dtype))[0]
        latents = (flow.sample_posterior(images, posterior_noise) - self.latent_shift) * self.latent_scale
        sigmas = flow.get_sigmas(self.sigmas, indices)
        noisy_latents = sigmas * noise + (1.0 - sigmas) * latents
        if self.text_encoder is not None:
            pooled_prompt_embeds = self.text_encoder(pooled_prompt_embeds)[1]
        guidance = None
        if self.guidance_embeds:
            guidance = ops.full((1,), self.args.guidance_scale, dtype=ms.float32).broadcast_to((noise.shape[0],))
        prediction = self.transformer(
            hidden_states=flow.pack_latents(noisy_latents).to(self.compute_dtype),
            timestep=sigmas.reshape((-1,)),  # the transformer takes t / 1000, which is sigma
            guidance=guidance,
            pooled_projections=pooled_prompt_embeds.to(self.compute_dtype),
            encoder_hidden_states=prompt_embeds.to(self.compute_dtype),
            txt_ids=self.text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return flow.unpack_latents(prediction, noise.shape[2], noise.shape[3]), noise - latents, sigmas

    def forward(self, images, posterior_noise, noise, indices, prompt_embeds, pooled_prompt_embeds, image_ids):
        prediction, target, sigmas = self.predict(
            images, posterior_noise, noise, indices, prompt_embeds, pooled_prompt_embeds, image_ids
        )
        weighting = flow.loss_weighting(self.args.weighting_scheme, sigmas)
        if self.args.with_prior_preservation:
            loss = flow.prior_preservation_mse(prediction, target, weighting, self.args.prior_loss_weight)
        else:
            loss = flow.weighted_mse(prediction, target, weighting)
        return self.scale_loss(loss), loss


# ---- looking -------------------------------------------------------------------------------------


class Painter:
    """Draws the validation prompts with the transformer at hand; loads only the prompts' cached embeddings, and the VAE for a while."""

    def __init__(self, args, root, stage, kind, seed, latent_shape, vae, tokenizer, transformer, text_encoder):
        self.args, self.root, self.kind, self.seed = args, root, kind, seed
        self.vae, self.borrows = vae, vae is None
        self.latent_shape, self.tokenizer = latent_shape, tokenizer
        self.transformer, self.text_encoder = transformer, text_encoder
        self.text = {prompt: stage.text(prompt) for prompt in args.validation_prompt}
        self.scheduler = configs.read_config(root, "scheduler")

    def rows(self, with_base=False):
        """A row of --num_validation_images pictures a prompt, always from the same noise; `with_base`: before each that of the base."""
        if self.borrows:
            self.vae = loading.load_model(self.root, "vae", self.kind, self.args.variant)
        trained = [m for m in (self.transformer, self.text_encoder) if m is not None]
        drawn = []
        with execution.eval_mode(*trained):
            for adapted in (False, True) if with_base else (True,):  # the adapter is left switched on
                for model in trained:
                    lora.enable_lora(model, adapted)
                numbers = range(self.args.num_validation_images)
                drawn.append([[self._image(prompt, text, n) for n in numbers] for prompt, text in self.text.items()])
        if self.borrows:
            self.vae = None
            execution.free_memory()
        return [row for prompt in zip(*drawn) for row in prompt]

    def _image(self, prompt, text, number):
        noise = rng.normal(self.seed, "validation", number, shape=(1, *self.latent_shape))
        pooled = text["pooled_prompt_embeds"][None]
        if self.text_encoder is not None:
            pooled = clip_pooled(self.text_encoder, self.tokenizer, prompt)[None]
        steps, compute = self.args.num_inference_steps, self.kind.compute
        latents = sampling.sample_latents(
            self.transformer,
            self.scheduler,
            text["prompt_embeds"][None],
            pooled,
            noise,
            steps,
            self.args.guidance_scale,
            compute,
        )
        return sampling.decode_latents(self.vae, latents, compute)[0]


# ---- the job -------------------------------------------------------------------------------------


# Flags that may change from one start of a run to the next without changing what is trained.
SAME_RUN = {
    "pretrained_model_name_or_path", "revision", "cache_dir", "instance_data_dir", "class_data_dir", "dataset_name", "skip_bad_images",
    "dataloader_num_workers", "output_dir", "overwrite_output_dir", "checkpointing_steps", "checkpoints_total_limit", "seed",
    "resume_from_checkpoint", "upcast_before_saving", "logging_dir", "report_to", "validation_prompt", "num_validation_images",
    "num_inference_steps", "validation_epochs", "sample_batch_size", "prior_generation_precision", "num_train_epochs", "max_train_steps",
    "push_to_hub", "hub_token", "hub_model_id", "lora_model_name_or_path", "dry_run", "device_memory_gb", *ACCEPTED,
    "lr_schedule_steps",  # what it changes is told
    # What counts of these is how many samples make up an update.
    "train_batch_size", "gradient_accumulation_steps", "distributed", "zero_stage",
}  # fmt: skip
OUR_FILES = (
    "run.json",
    report.REPORT_FILE,
    "metrics.jsonl",
    "loss_by_timestep.csv",
    "loss_by_timestep.png",
    lora.LORA_FILE,
)


def trained_before(args, root):
    """The LoRA that --lora_model_name_or_path names, by model, and its file's digest. Raises UserError if this run cannot go on from it."""
    flag = "--lora_model_name_or_path"
    path = lora.find_lora(args.lora_model_name_or_path, flag)
    if Path(args.output_dir).resolve() in path.resolve().parents:
        raise UserError(f"{flag} {path}: lies in --output_dir, where this run writes. Name another output directory.")
    parts = lora.read_parts(path, flag)
    layers = {name: linear_layers(root, name, args.variant) for name in ("transformer", "text_encoder")}
    lora.check_parts(path, flag, parts, layers)
    if "text_encoder" in parts and not args.train_text_encoder:
        raise UserError(f"{flag} {path}: adapts CLIP too, which would be lost. Add --train_text_encoder.")
    print(f"going on from {path} ({lora.describe(parts)}): there --lora_rank and --lora_layers do nothing")
    return parts, files.file_digest(path)


def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    if args.dry_run:
        root = pipelines.resolve_pipeline(
            args.pretrained_model_name_or_path,
            args.revision,
            args.variant,
            args.cache_dir,
            pipelines.FLUX_COMPONENTS,
            weights=False,
        )
        loading.check_files(root, loading.with_weights(root, pipelines.FLUX_COMPONENTS, args.variant), args.variant)
        print(plan.describe(memory_settings(args, root), args.device_memory_gb))
        return 0

    # ---- check everything ------------------------------------------------------------------------
    services = tracking.services(args.report_to)
    execution.set_up_device(graph_mode=args.mindspore_mode == 0)
    ranks.set_up(args.distributed)
    output_dir, resume = checkpoint.open_output_dir(
        args.output_dir, args.resume_from_checkpoint, args.overwrite_output_dir, OUR_FILES, lora.LORA_FILE
    )
    ranks.require_same(str(resume), "--output_dir: the checkpoint to go on from")
    state = json.loads((resume / "trainer_state.json").read_text()) if resume else {}
    for flag in ("cache_dir", "class_data_dir"):
        files.require_writable(f"--{flag}", getattr(args, flag))
    token, args.hub_token = args.hub_token, None  # nothing that is written may hold it
    repo_id = ranks.on_main_process(hub.check, args.hub_model_id, args.output_dir, token) if args.push_to_hub else None
    root = pipelines.resolve_pipeline(
        args.pretrained_model_name_or_path, args.revision, args.variant, args.cache_dir, pipelines.FLUX_COMPONENTS
    )
    loading.check_files(root, pipelines.FLUX_COMPONENTS, args.variant)
    targets = {
        "transformer": [t.strip() for t in args.lora_layers.split(",")]
        if args.lora_layers
        else lora.TRANSFORMER_TARGETS
    }
    going_on, lora_digest = trained_before(args, root) if args.lora_model_name_or_path else ({}, None)
    if args.lora_layers and "transformer" not in going_on:
        lora.check_targets(loading.flux_skeleton(root), targets["transformer"], "--lora_layers")
    if args.train_text_encoder:
        targets["text_encoder"] = lora.TEXT_ENCODER_TARGETS
    sizes = buckets.crop_sizes(args.aspect_ratio_buckets, args.resolution)
    samples = load_samples(args, sizes)
    numbers = buckets.bucket_ids(samples, sizes)
    shares = class_shares(args, numbers) if args.with_prior_preservation else {}
    prior_samples, prior_numbers = class_samples(args, sizes, shares) if shares else ([], np.array([], int))

    seed = args.seed if args.seed is not None else state.get("seed", secrets.randbelow(2**31))
    seed = ranks.all_gather(seed)[0]
    kept, kept_out = order.split(len(samples), args.validation_split, seed)
    train_samples, held_out = [samples[i] for i in kept], [samples[i] for i in kept_out]
    logging_dir = output_dir / args.logging_dir
    output_dir.mkdir(parents=True, exist_ok=True)

    # ---- encode once, in a process that gives its memory back ------------------------------------
    kind, int8 = precision.resolve_precision(args.mixed_precision), args.base_precision == "int8"
    if kind.storage != kind.compute:
        print("bf16 on the CPU: weights are stored in bf16 and computed in fp32, for want of bf16 matrix products")
    stage = make_stage(args, root, args.mixed_precision)
    if len(prior_samples) < sum(shares.values()):
        make_class_images(args, root, seed, sizes, shares, prior_numbers)
        prior_samples, prior_numbers = class_samples(
            args, sizes, shares, say=lambda line: None
        )  # what it left out is said
    captions = [s.caption for s in samples + prior_samples] + args.validation_prompt
    images = []
    if args.cache_latents:
        print(
            "--cache_latents: every picture keeps its centre crop" + (", one entry a flip" if args.random_flip else "")
        )
        used = [(samples[i], numbers[i]) for i in kept] + list(zip(prior_samples, prior_numbers))
        images = [
            (sample, sizes[k], flip) for sample, k in used for flip in ([False, True] if args.random_flip else [False])
        ]
        images += [(samples[i], sizes[numbers[i]], False) for i in kept_out]
    tell(stage.long_captions(captions))
    encoded = stage.prepare(captions, images)
    print(f"encode stage: {encoded} made, {len(set(captions)) + len(images) - encoded} already in {stage.cache_dir}")

    # ---- load, freeze, cast ----------------------------------------------------------------------
    ms.set_seed(
        (seed + state.get("global_step", 0) + ranks.rank()) % 2**32
    )  # only --lora_dropout draws from MindSpore's own generators
    transformer = loading.load_model(root, "transformer", kind, args.variant, int8)
    text_encoder = loading.load_model(root, "text_encoder", kind, args.variant) if args.train_text_encoder else None
    tokenizer = loading.load_tokenizer(root / "tokenizer") if args.train_text_encoder else None
    vae = None if args.cache_latents else loading.load_model(root, "vae", kind, args.variant)
    trained = {"transformer": transformer, **({"text_encoder": text_encoder} if args.train_text_encoder else {})}
    for model in (*trained.values(), *([vae] if vae else [])):
        precision.freeze_params(model)

    # ---- add what trains -------------------------------------------------------------------------
    alpha = args.lora_alpha if args.lora_alpha is not None else float(args.lora_rank)
    for name, model in trained.items():
        if name in going_on:
            lora.add_trained_lora(model, going_on[name], args.lora_alpha, args.lora_dropout, kind.compute)
        else:
            lora.add_lora(model, args.lora_rank, alpha, args.lora_dropout, targets[name], kind.compute)
        model.set_train(True)
    # MindSpore's optimizers update in the parameter's own precision: what trains is float32 under fp16 and bf16 too.
    precision.cast_training_params(trained.values(), ms.float32)
    for name in trained.keys() - going_on.keys():
        lora.init_lora(trained[name], args.lora_rank, seed)
    if args.gradient_checkpointing:
        clip_layers = text_encoder.text_model.encoder.layers if args.train_text_encoder else ()
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks, *clip_layers):
            block.recompute()
    print(precision.parameter_table({**trained, **({"vae": vae} if vae else {})}, kind))

    # ---- the step --------------------------------------------------------------------------------
    vae_config, scheduler_config = configs.read_config(root, "vae"), configs.read_config(root, "scheduler")
    latent = vae_config["latent_channels"], 2 ** (len(vae_config["block_out_channels"]) - 1)
    auto, tokens = args.timestep_shift == "auto", max(h * w for h, w in sizes) // (2 * latent[1]) ** 2
    shift = flow.resolution_shift(tokens, scheduler_config) if auto else float(args.timestep_shift)
    sigmas = flow.shift_sigmas(loading.load_scheduler(root).sigmas.asnumpy(), shift)
    batches = Batches(
        args, seed, stage, sizes, (train_samples, numbers[kept]), (prior_samples, prior_numbers), (held_out, numbers[kept_out]), latent,
        len(sigmas), tokenizer,
    )  # fmt: skip
    per_update = args.train_batch_size * args.gradient_accumulation_steps * ranks.world_size()
    max_train_steps = args.max_train_steps or math.ceil(args.num_train_epochs * batches.epoch_length / per_update)
    schedule_steps = args.lr_schedule_steps or max_train_steps

    base_rates = [args.learning_rate * (per_update if args.scale_lr else 1)]
    groups = [{"params": transformer.trainable_params(), "lr": base_rates[0], "weight_decay": args.adam_weight_decay}]
    if args.train_text_encoder:
        # Prodigy has one step size for all; the reference gives CLIP the transformer's rate then.
        base_rates.append(base_rates[0] if args.optimizer == "prodigy" else args.text_encoder_lr)
        decay = args.adam_weight_decay_text_encoder
        groups.append({"params": text_encoder.trainable_params(), "lr": base_rates[1], "weight_decay": decay})
    make = partial(
        optimizers.create_optimizer, args.optimizer, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, beta3=args.prodigy_beta3,
        decouple=args.prodigy_decouple, use_bias_correction=args.prodigy_use_bias_correction,
        safeguard_warmup=args.prodigy_safeguard_warmup, eight_bit=args.use_8bit_adam, offload=args.offload_optimizer,
    )  # fmt: skip
    optimizer = zero1.ShardedOptimizer(make, groups) if args.zero_stage else make(groups)
    scaler = precision.loss_scaler(args.mixed_precision)
    step = TrainStepForFluxDevDB(
        transformer, optimizer, {"sigmas": ms.Tensor(sigmas, ms.float32)}, kind.compute, args, vae_config,
        ms.Tensor(np.zeros((args.max_sequence_length, 3), np.float32)), vae, text_encoder, scaler,
    )  # fmt: skip
    painter = Painter(
        args, root, stage, kind, seed, batches.latent_shape(sizes[0]), vae, tokenizer, transformer, text_encoder
    )

    # ---- resume ----------------------------------------------------------------------------------
    remembered = {f"{n}.{k}": p for n, model in trained.items() for k, p in lora.lora_parameters(model).items()}
    remembered.update({f"optimizer.{k}": p for k, p in optimizers.optimizer_state(optimizer).items()})
    if args.mixed_precision == "fp16":
        remembered.update({"loss_scale": scaler.scale_value, "loss_scale_counter": scaler.counter})
    fingerprint = files.text_digest(s.digest + s.caption for s in train_samples + prior_samples)
    base = encoder_fingerprint(root / "transformer", weight_files(root, "transformer", args.variant))
    identity = {
        "seed": seed,
        "data": fingerprint,
        "base": base,
        "lora_model": lora_digest,
        "samples_per_update": per_update,
    }
    if len(sizes) > 1:  # a batch is of one bucket
        identity["batch_size"] = args.train_batch_size
    identity.update({k: v for k, v in vars(args).items() if k not in SAME_RUN})
    global_step = 0
    if resume:
        checkpoint.load_state(
            resume / "training_state.safetensors", remembered, itertools.chain(*ranks.all_gather(list(remembered)))
        )
        global_step = state["global_step"]
        changed = [name for name, value in identity.items() if state.get(name) != value]
        if changed:
            print(
                f"resuming with another {', '.join(changed)} than the checkpoint was made with: not its exact continuation"
            )
        for path in ranks.on_main_process(checkpoint.set_aside_later, output_dir, resume) or ():
            print(f"a later checkpoint is kept as {path.name}")
        print(f"resuming from {resume.name} after update {global_step}")

    def save_files(folder, values):
        lora.save_lora(folder / lora.LORA_FILE, trained, ms.float32)
        checkpoint.save_state(folder / "training_state.safetensors", values)
        (folder / "trainer_state.json").write_text(
            json.dumps({"global_step": global_step, "lr_schedule_steps": schedule_steps, **identity})
        )

    def save():
        values = ranks.gather_parameters(remembered)
        if tracker is None:
            return None
        tracker.flush()
        write = partial(save_files, values=values)
        return checkpoint.save_checkpoint(output_dir, global_step, write, args.checkpoints_total_limit)

    def look(final=False):
        """Held-out loss and validation pictures of this moment; the first worker's job, for which the others wait."""
        if tracker is None:
            return None
        if held_out and not curve.has(global_step):
            losses = held_out_loss(step, trained.values(), batches.held_out, len(held_out))
            curve.add(global_step, [float(sigmas[i]) for i in HELD_OUT_INDICES], losses)
            by_sigma = {f"held_out__loss_at_{sigmas[i]:.3f}": value for i, value in zip(HELD_OUT_INDICES, losses)}
            tracker.log(global_step, held_out__loss=float(np.mean(losses)), **by_sigma)
        if args.validation_prompt and global_step:
            rows, labels = painter.rows(with_base=final), list(args.validation_prompt)
            if final:
                labels = [f"{prompt} ({who})" for prompt in labels for who in ("base", "adapter")]
            grid = grids.image_grid(rows, labels)
            name = "final" if final else f"step-{global_step:06d}"
            tracker.image(global_step, "validation", grid)
            return grids.save_image(grid, output_dir / "samples" / f"{name}.png")
        return None

    # ---- the loop --------------------------------------------------------------------------------
    tell(
        advice.on_settings(
            args.optimizer, base_rates[0], args.lr_scheduler, args.lr_warmup_steps, schedule_steps, max_train_steps
        )
    )
    if resume:
        tell(advice.on_resumed_schedule(
            args.lr_scheduler, state.get("lr_schedule_steps"), schedule_steps, global_step, base_rates[0], args.lr_warmup_steps,
            args.lr_num_cycles, args.lr_power,
        ))  # fmt: skip
    epoch_updates = batches.epoch_length / per_update
    print(f"optimizer state: {optimizers.state_bytes(optimizer):,} bytes on each of {ranks.world_size()} workers")
    print(
        f"{len(train_samples)} pictures, {len(held_out)} held out, {len(prior_samples)} class pictures; "
        f"batch {args.train_batch_size} x {args.gradient_accumulation_steps} accumulation x {ranks.world_size()} workers; "
        f"{max_train_steps} updates, "
        f"{max_train_steps / epoch_updates:.1f} epochs; seed {seed}"
    )
    record = {
        "flags": vars(args), "seed": seed, "versions": tracking.package_versions(), "device": ms.get_context("device_target"),
        "data": {"fingerprint": fingerprint, "samples": len(train_samples), "held_out": [s.name for s in held_out]},
        "trainable": {name: sum(p.size for p in model.trainable_params()) for name, model in trained.items()},
        "workers": ranks.world_size(),
    }  # fmt: skip
    tracker = curve = None
    if ranks.is_main_process():
        if args.overwrite_output_dir and not checkpoint.belongs_to(resume, output_dir):
            checkpoint.remove_old_run(output_dir, logging_dir, OUR_FILES)
        tracking.write_run_json(output_dir / "run.json", **record, finished=False)
        tracker = tracking.Tracker(output_dir, logging_dir, services, global_step, vars(args))
        curve = tracking.LossByTimestep(output_dir, global_step)
    stop, seconds, skipped = StopRequest(), [], 0
    accumulation = args.gradient_accumulation_steps
    numbers = ranks.shard(
        range(global_step * accumulation * ranks.world_size(), max_train_steps * accumulation * ranks.world_size())
    )
    ahead = order.prefetch(batches.at, numbers, args.dataloader_num_workers)
    if not resume:
        look()
    bar = tqdm(
        total=max_train_steps,
        initial=global_step,
        unit="update",
        dynamic_ncols=True,
        disable=not ranks.is_main_process(),
    )
    while global_step < max_train_steps and not any(ranks.all_gather(stop.exit_code)):
        began = time.perf_counter()
        lr_factor = schedules.schedule_factor(
            args.lr_scheduler,
            global_step,
            args.lr_warmup_steps,
            schedule_steps,
            args.lr_num_cycles,
            args.lr_power,
            base_rates[0],
        )
        rates = [rate * lr_factor for rate in base_rates]
        optimizers.set_learning_rates(optimizer, rates)
        losses = [float(step(*inputs)[1]) for inputs in ranks.micro_batches(step, ahead, accumulation)]
        loss, norm = float(np.mean(ranks.all_gather(losses))), float(step.grad_clipper.norm)
        global_step += 1
        values = {"loss": loss, "lr": rates[0], "grad_norm": norm}
        if args.train_text_encoder:
            values["lr_text_encoder"] = rates[1]
        if args.optimizer == "prodigy":
            values["d"] = float(optimizer.d)
        if args.mixed_precision == "fp16":
            values["loss_scale"] = float(scaler.scale_value)
        if not math.isfinite(loss + norm):
            # In fp16 an overflow only skips the update and halves the scale; once the scale is at its floor it is no overflow.
            skipped += 1
            if args.mixed_precision != "fp16" or values["loss_scale"] <= 1.0:
                bar.close()
                # A checkpoint of the update before holds the weights that gave this loss: not known to be good.
                good = [
                    path for path in checkpoint.checkpoints(output_dir) if checkpoint.step_of(path) < global_step - 1
                ]
                raise UserError(
                    f"update {global_step}: the loss is {loss}, the gradients' norm {norm}. Nothing was saved of it; the last good "
                    f"checkpoint is {good[-1] if good else '(none yet)'}. Try a lower --learning_rate, or bf16 instead of fp16."
                )
            tqdm.write(f"update {global_step}: overflow in fp16, skipped; loss scale {values['loss_scale']:g}")
            values = {name: value for name, value in values.items() if math.isfinite(value)}
        if tracker:
            tracker.log(global_step, **values)
        seconds.append(time.perf_counter() - began)
        bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rates[0]:.2e}", s=f"{np.median(seconds[-20:]):.2f}", refresh=False)
        bar.update()
        if global_step < max_train_steps:
            every = args.validation_epochs * epoch_updates
            if global_step // every > (global_step - 1) // every:
                look()
            if global_step % args.checkpointing_steps == 0:
                save()  # after looking: a run resumed from here shall not miss what was to be seen at this update
                execution.free_memory()  # PyNative's many small blocks
    bar.close()

    # ---- stopped, or done ------------------------------------------------------------------------
    def finish_run_json(finished):
        steady = seconds[2:] or seconds
        tracking.write_run_json(
            output_dir / "run.json", **record, finished=finished, updates=global_step, skipped_updates=skipped,
            seconds_per_step=float(np.median(steady)) / accumulation if steady else None, seconds_total=time.time() - started,
            seconds_to_first_update=seconds[0] if seconds else None, peak_memory_mb=tracking.peak_memory_mb(),
            memory=plan.measured(memory_settings(args, root)),
        )  # fmt: skip

    folder = save()
    if global_step < max_train_steps:
        ranks.on_main_process(finish_run_json, False)
        ranks.on_main_process(report.write_report, output_dir)
        print(
            f"saved {folder} after update {global_step}. Go on with the same command and --resume_from_checkpoint latest"
        )
        ranks.finish()
        return 130  # as a shell reports Ctrl-C
    if ranks.is_main_process():
        dtype = ms.float32 if args.upcast_before_saving else kind.storage
        final = output_dir / lora.LORA_FILE
        files.write_atomically(final, lambda path: lora.save_lora(path, trained, dtype))
        grid, plot = look(final=True), curve.plot()
        tracker.close()
        finish_run_json(True)
        page = report.write_report(output_dir)
        curves = logging_dir if services else output_dir / "metrics.jsonl"
        left = {"adapter": final, "picture grid": grid, "held-out loss plot": plot, "curves": curves, "report": page}
        for what, path in left.items():
            if path:
                print(f"{what}: {path}")
        if repo_id:
            address = hub.push(repo_id, output_dir, args.pretrained_model_name_or_path, args.validation_prompt, token)
            print(f"on the hub: {address}")
    ranks.finish()
    return 0


if __name__ == "__main__":
    run(main)
