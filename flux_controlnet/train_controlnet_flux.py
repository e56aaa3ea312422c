"""ControlNet for FLUX.1 on MindSpore: teaches a copy of the first blocks to follow a condition picture.

    python train_controlnet_flux.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev \\
        --dataset_name fusing/fill50k --conditioning_image_column conditioning_image --image_column image --caption_column text \\
        --output_dir out --mixed_precision bf16 --resolution 512 --train_batch_size 1 --cache_latents --max_train_steps 15000

Leaves the ControlNet at the root of the output directory (config.json and diffusion_pytorch_model.safetensors), checkpoints,
samples/*.png, loss curves for TensorBoard, metrics.jsonl and run.json. Ctrl-C saves a checkpoint; the same command with
--resume_from_checkpoint latest goes on, bit for bit on the CPU.
"""

import argparse
import contextlib
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
from mindtune.cli import StopRequest, UserError, check_flags, matched, run, tell
from mindtune.data import buckets, conditions, crops, grids, pair_checks, pair_data, pair_stream, pairs
from mindtune.data.pair_data import PairCaptions, PairImages
from mindtune.distributed import ranks
from mindtune.encode.cache import encoder_fingerprint
from mindtune.encode.encoder_stage import EncoderStage
from mindtune.models import (
    configs,
    controlnets,
    execution,
    flux_blocks,
    library,
    loading,
    pipelines,
    precision,
    sampling,
)
from mindtune.models.weights import weight_files
from mindtune.optim import advice, averaging, optimizers, schedules, zero1
from mindtune.run import checkpoint, hub, memory, plan, report, tracking
from mindtune.run.evaluation import HELD_OUT_INDICES, held_out_loss

# ---- flags ---------------------------------------------------------------------------------------

# CUDA and PyTorch switches that a diffusers command may carry, and what this backend does anyway.
ACCEPTED = {
    "allow_tf32": "a CUDA setting; this backend's matrix products run in the type --mixed_precision names",
    "enable_xformers_memory_efficient_attention": "a CUDA kernel; on Ascend mindone uses its own flash attention without a flag",
    "enable_npu_flash_attention": "mindone uses flash attention on Ascend without a flag",
    "set_grads_to_none": "MindSpore's gradients are values, not kept between updates: there is nothing to set",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument

    # Model
    add("--pretrained_model_name_or_path", required=True, help="Directory of a FLUX.1 pipeline, or a hub id.")
    add(
        "--controlnet_model_name_or_path",
        help="A ControlNet to go on from. Default: a copy of the transformer's first blocks.",
    )
    add("--num_double_layers", type=int, default=4, help="Double blocks of a new ControlNet.")
    add("--num_single_layers", type=int, default=4, help="Single blocks of a new ControlNet.")
    add("--revision", help="Branch, tag or commit on the hub. Default: main.")
    add("--variant", help="Variant of the weight files, such as fp16. Default: none.")
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
    add("--dataset_name", help="A data set for the datasets library: a hub id or a local directory (also .tar shards).")
    add("--dataset_config_name", help="Configuration of that data set. Default: its only one.")
    add(
        "--train_data_dir",
        help="Instead: a directory with images and metadata.jsonl or .csv, parquet or arrow files, or .tar shards.",
    )
    add(
        "--jsonl_for_train",
        help="Instead: a .jsonl file of lines with the paths of image and conditioning_image, and text.",
    )
    add("--image_column", help="Column of target pictures. Default: image, or the first image column.")
    add(
        "--conditioning_image_column", help="Column of condition pictures. Default: the one that begins with condition."
    )
    add("--caption_column", help="Column of captions. Default: text, caption or prompt.")
    add("--streaming", action="store_true", help="Read the data in passing, never all of it; needs --max_train_steps.")
    add("--shuffle_buffer_size", type=int, default=1000, help="Samples that --streaming shuffles among.")
    add("--max_train_samples", type=int, help="Use the first so many pairs. Default: all.")
    add(
        "--proportion_empty_prompts", type=float, default=0.0, help="Share of uses with an empty caption, drawn afresh."
    )
    add("--skip_bad_images", action="store_true", help="Go on without unusable pairs, listing them.")
    add(
        "--validation_split",
        type=float,
        default=0.0,
        help="Share of the pairs kept out of training to measure their loss; 0: none.",
    )
    add(
        "--resolution", type=int, default=512, help="Side of the square that is trained on, in pixels; divisible by 16."
    )
    add(
        "--aspect_ratio_buckets",
        help='Instead: heights and widths to choose from for every pair, "672,1568;1024,1024".',
    )
    add("--center_crop", action="store_true", help="Crop centrally. Default: a fresh random crop for every use.")
    add(
        "--random_flip",
        action="store_true",
        help="Mirror half of the uses, drawn afresh, picture and condition together.",
    )
    add(
        "--image_interpolation_mode",
        choices=sorted(crops.INTERPOLATIONS),
        default="lanczos",
        help="Filter for resizing.",
    )
    add(
        "--cache_latents",
        action="store_true",
        help="Encode pictures and conditions once, centre-cropped, one entry a flip.",
    )
    add("--dataloader_num_workers", type=int, default=1, help="Threads that make batches ahead of the step; 0: none.")
    add("--max_sequence_length", type=int, default=512, help="T5 tokens of a prompt, at most 512.")
    # Step
    add(
        "--weighting_scheme",
        choices=flow.WEIGHTING_SCHEMES,
        default="logit_normal",
        help="Density of timesteps and weight of their loss.",
    )
    add("--logit_mean", type=float, default=0.0, help="Mean, for logit_normal.")
    add("--logit_std", type=float, default=1.0, help="Standard deviation, for logit_normal.")
    add("--mode_scale", type=float, default=1.29, help="Scale, for mode.")
    add(
        "--timestep_shift",
        default="1",
        help="Shift training towards noise: a factor, or auto for --resolution's. 1: as FLUX.1-dev.",
    )
    add(
        "--guidance_scale",
        type=float,
        default=3.5,
        help="Guidance given to guidance-distilled models, training and sampling.",
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
        help="Recompute all blocks in the backward pass to save memory.",
    )
    add("--train_batch_size", type=int, default=4, help="Pairs a step and worker.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Steps an update.")
    add("--num_train_epochs", type=int, default=1, help="Passes over the pairs.")
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
    add("--learning_rate", type=float, default=5e-6, help="Base rate; for prodigy about 1.")
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
    add("--adam_weight_decay", type=float, default=1e-2, help="Decoupled weight decay.")
    add("--max_grad_norm", type=float, default=1.0, help="Clip the gradients' norm; 0: no clipping.")
    add(
        "--use_ema",
        action="store_true",
        help="Keep a moving average of the ControlNet; it is what is drawn with and saved at the end.",
    )
    add("--ema_decay", type=float, default=0.9999, help="Highest decay of that average.")
    # Output
    add("--output_dir", default="flux-controlnet", help="Directory for everything that the run leaves.")
    add("--overwrite_output_dir", action="store_true", help="Remove another run's files there first.")
    add("--checkpointing_steps", type=int, default=500, help="Updates between checkpoints.")
    add("--checkpoints_total_limit", type=int, help="Keep the newest so many. Default: all.")
    add("--resume_from_checkpoint", help="latest, a checkpoint's name in the output directory, or its path.")
    add(
        "--save_weight_dtype",
        choices=["fp32", "fp16", "bf16"],
        default="fp32",
        help="Type of the final ControlNet's weights.",
    )
    add("--upcast_before_saving", action="store_true", help="The same as --save_weight_dtype fp32.")
    add("--logging_dir", default="logs", help="TensorBoard's directory, inside the output directory.")
    add(
        "--report_to",
        choices=["tensorboard", "wandb", "swanlab", "all", "none"],
        default="tensorboard",
        help="Where curves go, besides metrics.jsonl; all: those that are installed and logged in.",
    )
    add("--validation_prompt", nargs="+", default=[], help="Prompts to draw while training and at the end.")
    add(
        "--validation_image",
        nargs="+",
        default=[],
        help="Their condition pictures: one for all, one each, or several for one prompt.",
    )
    add("--num_validation_images", type=int, default=4, help="Pictures a pair of prompt and condition.")
    add("--num_inference_steps", type=int, default=28, help="Steps of sampling.")
    add("--controlnet_conditioning_scale", type=float, default=1.0, help="Strength of the ControlNet when drawing.")
    add("--validation_steps", type=int, default=100, help="Updates between validations.")
    add("--push_to_hub", action="store_true", help="Upload the ControlNet with a model card when the run is done.")
    add("--hub_token", help="Token with write access; written nowhere. Default: HF_TOKEN, or that of the last login.")
    add("--hub_model_id", help="Repository to upload to. Default: the output directory's name, in your account.")
    add("--dry_run", action="store_true", help="Print the memory plan and end; reads configs only, writes nothing.")
    add(
        "--device_memory_gb",
        type=float,
        default=64,
        help="Memory of the device that the plan shall fit, such as 64 or 32 on Ascend.",
    )
    # Reference flags of other versions or backends
    for name, why in ACCEPTED.items():
        add(f"--{name}", action="store_true", help=f"Accepted: {why}.")

    args = parser.parse_args(argv)
    check_args(args)
    return args


def memory_settings(args, root, existing):
    """What determines the memory of the run."""
    return memory.Settings(
        system="flux_controlnet",
        root=root,
        controlnet=existing,
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
        use_ema=args.use_ema,
        base_precision=args.base_precision,
        max_sequence_length=args.max_sequence_length,
        num_double_layers=args.num_double_layers,
        num_single_layers=args.num_single_layers,
    )


def check_args(args):
    """Refuses what cannot work, before anything is read or written. Raises UserError."""
    at_least = {"num_double_layers": 0, "num_single_layers": 0, "train_batch_size": 1, "gradient_accumulation_steps": 1}
    at_least.update(
        num_train_epochs=1, checkpointing_steps=1, validation_steps=1, num_validation_images=1, num_inference_steps=1
    )
    at_least.update(
        max_train_steps=1,
        lr_schedule_steps=1,
        checkpoints_total_limit=1,
        max_train_samples=1,
        max_sequence_length=1,
        device_memory_gb=1,
        shuffle_buffer_size=1,
    )
    at_least.update(
        learning_rate=0, max_grad_norm=0, lr_warmup_steps=0, dataloader_num_workers=0, ema_decay=0, validation_split=0
    )
    at_least.update(proportion_empty_prompts=0, adam_beta1=0, adam_beta2=0)
    check_flags(vars(args), ACCEPTED, at_least, ("validation_split", "ema_decay", "adam_beta1", "adam_beta2"))
    optimizers.check_state_flags(args.optimizer, args.use_8bit_adam, args.offload_optimizer, args.mindspore_mode == 0)
    zero1.check_flags(args.zero_stage, args.distributed, args.optimizer)

    pairs.check_source_flags(vars(args))
    if args.resolution % 16 or args.resolution < 16:
        near = max(16, round(args.resolution / 16) * 16)
        raise UserError(
            f"--resolution {args.resolution}: must be divisible by 16 (VAE 8, patches 2). The nearest is {near}."
        )
    if args.num_double_layers + args.num_single_layers == 0:
        raise UserError("--num_double_layers 0 --num_single_layers 0: nothing would train; give at least one block.")
    if args.max_sequence_length > 512:
        raise UserError(
            f"--max_sequence_length {args.max_sequence_length}: T5 was trained on at most 512 tokens here; use 512 or less."
        )
    if args.timestep_shift != "auto":
        try:
            usable = 0 < float(args.timestep_shift) < math.inf
        except ValueError:
            usable = False
        if not usable:
            raise UserError(f"--timestep_shift {args.timestep_shift}: give a positive factor or auto.")


# ---- data ----------------------------------------------------------------------------------------


def load_data(args, seed):
    """The `pairs.PairData` of the run, checked to the last pixel row; with --streaming it is checked while it is encoded."""
    source = pairs.Source(
        args.dataset_name, args.dataset_config_name, args.train_data_dir, args.jsonl_for_train, args.cache_dir, args.image_column,
        args.conditioning_image_column, args.caption_column,
    )  # fmt: skip
    sizes = buckets.crop_sizes(args.aspect_ratio_buckets, args.resolution)
    if args.streaming:
        count = args.max_train_steps * args.train_batch_size * args.gradient_accumulation_steps * ranks.world_size()
        stream = pair_stream.PairStream(source, seed, args.shuffle_buffer_size, count)
        return pair_data.PairData(stream, [], sizes, seed, args.train_batch_size)
    return pair_data.load_data(
        source, sizes, seed, args.train_batch_size, args.max_train_samples, args.validation_split, args.skip_bad_images,
        args.dataloader_num_workers,
    )  # fmt: skip


class Batches:
    """Numpy batches by position: a pure function of seed, sample ids and use counts.

    images and conditions [B, 2C, h, w] (cached moments) or [B, 3, H, W] (pixels); posterior noise of both and noise [B, C, h, w],
    index [B], prompt_embeds [B, L, D], pooled_prompt_embeds [B, P], and the image ids [T, 3] of the batch's bucket.
    """

    def __init__(self, args, seed, stage, pair_data, latent, num_train_timesteps):
        self.args, self.seed, self.stage, self.data = args, seed, stage, pair_data
        self.latent, self.num_train_timesteps = latent, num_train_timesteps

    def iterate(self, first, last):
        """This worker's share of the batches from number `first` to before `last` of all workers together."""
        return self.data.iterate(first, last, self._batch, self.args.dataloader_num_workers)

    def _batch(self, uses, size):
        rows = [self._row(pair, sample_id, use, size) for pair, sample_id, use in uses]
        return *(np.stack(column) for column in zip(*rows)), flow.latent_image_ids(*self.latent_shape(size)[1:])

    def latent_shape(self, size):
        channels, factor = self.latent
        return channels, size[0] // factor, size[1] // factor

    def _row(self, pair, sample_id, use, size):
        args, seed = self.args, self.seed
        draws = rng.generator(seed, "pair crop and flip", sample_id, use).random(3)
        flip = bool(args.random_flip and draws[2] < 0.5)
        place = None if args.center_crop else (draws[0], draws[1])
        images = self._images(pair, size, place, flip)
        u = flow.sample_density(
            rng.generator(seed, "pair timestep", sample_id, use),
            args.weighting_scheme,
            args.logit_mean,
            args.logit_std,
            args.mode_scale,
        )
        index = np.int32(flow.density_to_index(u, self.num_train_timesteps))
        shape = self.latent_shape(size)
        noises = [
            rng.normal(seed, what, sample_id, use, shape=shape)
            for what in ("pair posterior", "condition posterior", "pair noise")
        ]
        empty = rng.generator(seed, "empty prompt", sample_id, use).random() < args.proportion_empty_prompts
        return *images, *noises, index, *self._text("" if empty else pair.caption)

    def held_out(self, sample_id, index):
        """A batch of one held-out pair, always with the same draws for the same index."""
        pair, size = self.data.held_out[sample_id], self.data.buckets[self.data.held_out_numbers[sample_id]]
        shape = self.latent_shape(size)
        noises = [
            rng.normal(self.seed, f"held-out {what}", sample_id, shape=shape)
            for what in ("posterior", "condition posterior")
        ]
        noises.append(rng.normal(self.seed, "held-out noise", sample_id, index, shape=shape))
        row = *self._images(pair, size, None, False), *noises, np.int32(index), *self._text(pair.caption)
        return *(np.stack([column]) for column in row), flow.latent_image_ids(*shape[1:])

    def _images(self, pair, size, place, flip):
        """Target and condition, cropped by one box and mirrored together."""
        both = (pair.image, pair.condition)
        if self.args.cache_latents:
            return [self.stage.moments(sample, size, flip) for sample in both]
        if self.args.streaming:  # else the encode stage has looked at every pair
            pair_checks.require_usable(pair, self.args.resolution)
        return [
            crops.pixel_values(sample.open(), size, self.args.image_interpolation_mode, place, flip) for sample in both
        ]

    def _text(self, caption):
        text = self.stage.text(caption)
        return text["prompt_embeds"], text["pooled_prompt_embeds"]


# ---- the step ------------------------------------------------------------------------------------


class TrainStepForFluxControlNet(library.TrainStep):
    """One micro-batch: loss, gradients and, every `gradient_accumulation_steps` calls, an update. A pure function of its inputs.

    `vae` is given if the images come as pixels. Calling it gives (scaled loss, loss), scalars.
    """

    def __init__(
        self, controlnet, transformer, optimizer, sigmas, compute_dtype, args, latent_config, vae=None, loss_scaler=None
    ):
        super().__init__(
            controlnet,
            optimizer,
            loss_scaler=loss_scaler,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            # Batches run on across epochs, so there is no end of the loader at which to cut an update short.
            gradient_accumulation_kwargs={"sync_with_dataloader": False},
        )
        self.grad_clipper = precision.GradNormClipper(args.max_grad_norm)
        self.controlnet, self.transformer, self.vae = self.model, transformer, vae
        self.compute_dtype, self.sigmas = compute_dtype, sigmas
        # Configs are dicts, which a graph cannot read by attribute: take out what forward needs.
        self.latent_shift, self.latent_scale = flow.scale_constants(latent_config)
        self.controlnet_guidance = controlnet.config["guidance_embeds"]
        self.transformer_guidance = transformer.config["guidance_embeds"]
        self.text_ids = ms.Tensor(np.zeros((args.max_sequence_length, 3), np.float32))
        self.args = flow.AttrJitWrapper(weighting_scheme=args.weighting_scheme, guidance_scale=args.guidance_scale)

    def latents(self, images, posterior_noise):
        if self.vae is not None:
            images = self.vae.encode(images.to(self.compute_dtype))[0]
        return (flow.sample_posterior(images, posterior_noise) - self.latent_shift) * self.latent_scale

    def predict(
        self,
        images,
        conditions,
        posterior_noise,
        condition_noise,
        noise,
        indices,
        prompt_embeds,
        pooled_prompt_embeds,
        image_ids,
    ):
        """Prediction and target [B, C, h, w] float32, and sigmas [B, 1, 1, 1]."""
        latents = self.latents(images, posterior_noise)
        condition = flow.pack_latents(self.latents(conditions, condition_noise)).to(self.compute_dtype)
        sigmas = flow.get_sigmas(self.sigmas, indices)
        noisy = flow.pack_latents(sigmas * noise + (1.0 - sigmas) * latents).to(self.compute_dtype)
        timestep = sigmas.reshape((-1,))  # the models take t / 1000, which is sigma
        guidance = ops.full((1,), self.args.guidance_scale, dtype=ms.float32).broadcast_to((noise.shape[0],))
        pooled, text = pooled_prompt_embeds.to(self.compute_dtype), prompt_embeds.to(self.compute_dtype)
        blocks, single_blocks = self.controlnet(
            hidden_states=noisy,
            controlnet_cond=condition,
            timestep=timestep,
            guidance=guidance if self.controlnet_guidance else None,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=self.text_ids,
            img_ids=image_ids,
            return_dict=False,
        )
        prediction = self.transformer(
            hidden_states=noisy,
            timestep=timestep,
            guidance=guidance if self.transformer_guidance else None,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=self.text_ids,
            img_ids=image_ids,
            controlnet_block_samples=blocks,
            controlnet_single_block_samples=single_blocks,
            return_dict=False,
        )[0]
        return flow.unpack_latents(prediction, noise.shape[2], noise.shape[3]), noise - latents, sigmas

    def forward(
        self,
        images,
        conditions,
        posterior_noise,
        condition_noise,
        noise,
        indices,
        prompt_embeds,
        pooled_prompt_embeds,
        image_ids,
    ):
        prediction, target, sigmas = self.predict(
            images,
            conditions,
            posterior_noise,
            condition_noise,
            noise,
            indices,
            prompt_embeds,
            pooled_prompt_embeds,
            image_ids,
        )
        loss = flow.weighted_mse(prediction, target, flow.loss_weighting(self.args.weighting_scheme, sigmas))
        return self.scale_loss(loss), loss


# ---- looking -------------------------------------------------------------------------------------


class Painter:
    """Draws the validation rows with the ControlNet at hand; loads only the prompts' cached embeddings, and the VAE for a while."""

    def __init__(self, args, root, stage, kind, seed, rows, vae, transformer, controlnet):
        self.args, self.root, self.stage, self.kind, self.seed = args, root, stage, kind, seed
        self.vae, self.borrows = vae, vae is None
        self.transformer, self.controlnet, self.rows = transformer, controlnet, rows
        self.scheduler = configs.read_config(root, "scheduler")

    def draw(self):
        """A row of the condition and --num_validation_images pictures for every pair, always from the same noise."""
        if self.borrows:
            self.vae = loading.load_model(self.root, "vae", self.kind, self.args.variant)
        with execution.eval_mode(self.controlnet):
            drawn = [[condition, *self._images(prompt, condition)] for prompt, condition in self.rows]
        if self.borrows:
            self.vae = None
            execution.free_memory()
        return drawn

    def _images(self, prompt, condition):
        compute, text = self.kind.compute, self.stage.text(prompt)
        latents = sampling.encode_image(self.vae, condition, compute)
        for number in range(self.args.num_validation_images):
            noise = rng.normal(self.seed, "validation", number, shape=latents.shape)
            drawn = sampling.sample_latents(
                self.transformer, self.scheduler, text["prompt_embeds"][None], text["pooled_prompt_embeds"][None], noise,
                self.args.num_inference_steps, self.args.guidance_scale, compute,
                control=(self.controlnet, latents, self.args.controlnet_conditioning_scale),
            )  # fmt: skip
            yield sampling.decode_latents(self.vae, drawn, compute)[0]


# ---- the job -------------------------------------------------------------------------------------


# Flags that may change from one start of a run to the next without changing what is trained.
SAME_RUN = {
    "pretrained_model_name_or_path", "controlnet_model_name_or_path", "revision", "cache_dir", "dataset_name", "train_data_dir",
    "jsonl_for_train", "skip_bad_images", "dataloader_num_workers", "output_dir", "overwrite_output_dir", "checkpointing_steps",
    "checkpoints_total_limit", "seed", "resume_from_checkpoint", "save_weight_dtype", "upcast_before_saving", "logging_dir", "report_to",
    "validation_prompt", "validation_image", "num_validation_images", "num_inference_steps", "controlnet_conditioning_scale",
    "validation_steps", "num_train_epochs", "max_train_steps", "push_to_hub", "hub_token",
    "hub_model_id", "dry_run", "device_memory_gb", *ACCEPTED,
    "lr_schedule_steps",  # what it changes is told
    # What counts of these is how many samples make up an update.
    "train_batch_size", "gradient_accumulation_steps", "distributed", "zero_stage",
}  # fmt: skip
CONTROLNET_FLAG = "--controlnet_model_name_or_path"
FOLDER = "flux_controlnet"  # in a checkpoint, as the reference lays it out
FINAL = "diffusion_pytorch_model.safetensors"
OUR_FILES = (
    "run.json",
    report.REPORT_FILE,
    "metrics.jsonl",
    "loss_by_timestep.csv",
    "loss_by_timestep.png",
    "config.json",
    FINAL,
)


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
        base = configs.read_config(root, "transformer")
        existing = args.controlnet_model_name_or_path and pipelines.resolve_controlnet(
            args.controlnet_model_name_or_path, CONTROLNET_FLAG, args.cache_dir, base, weights=False
        )
        print(plan.describe(memory_settings(args, root, existing), args.device_memory_gb))
        return 0

    # ---- check everything ------------------------------------------------------------------------
    services = tracking.services(args.report_to)
    execution.set_up_device(graph_mode=args.mindspore_mode == 0)
    ranks.set_up(args.distributed)
    output_dir, resume = checkpoint.open_output_dir(
        args.output_dir, args.resume_from_checkpoint, args.overwrite_output_dir, OUR_FILES, FINAL
    )
    ranks.require_same(str(resume), "--output_dir: the checkpoint to go on from")
    state = json.loads((resume / "trainer_state.json").read_text()) if resume else {}
    files.require_writable("--cache_dir", args.cache_dir)
    token, args.hub_token = args.hub_token, None  # nothing that is written may hold it
    repo_id = ranks.on_main_process(hub.check, args.hub_model_id, args.output_dir, token) if args.push_to_hub else None
    root = pipelines.resolve_pipeline(
        args.pretrained_model_name_or_path, args.revision, args.variant, args.cache_dir, pipelines.FLUX_COMPONENTS
    )
    loading.check_files(root, pipelines.FLUX_COMPONENTS, args.variant)
    transformer_config = configs.read_config(root, "transformer")
    existing = None
    if args.controlnet_model_name_or_path:
        existing = pipelines.resolve_controlnet(
            args.controlnet_model_name_or_path, CONTROLNET_FLAG, args.cache_dir, transformer_config
        )
        loading.check_files(existing.parent, [existing.name])
        print(
            "--controlnet_model_name_or_path: it keeps its own blocks; --num_double_layers and --num_single_layers do nothing"
        )
    for flag, key in (("num_double_layers", "num_layers"), ("num_single_layers", "num_single_layers")):
        if not existing and getattr(args, flag) > transformer_config[key]:
            raise UserError(
                f"--{flag} {getattr(args, flag)}: the transformer has {transformer_config[key]} such blocks to copy."
            )
    to_draw = matched(args.validation_prompt, args.validation_image, "--validation_prompt", "--validation_image")
    for path in args.validation_image:
        conditions.require_condition(path, "--validation_image")  # before the data are looked at, which takes longer
    seed = args.seed if args.seed is not None else state.get("seed", secrets.randbelow(2**31))
    seed = ranks.all_gather(seed)[0]
    pair_data = load_data(args, seed)
    rows = [
        (prompt, conditions.condition_image(path, "--validation_image", args.resolution, 16, pair_data.background))
        for prompt, path in to_draw
    ]
    per_update = args.train_batch_size * args.gradient_accumulation_steps * ranks.world_size()
    max_train_steps = args.max_train_steps or math.ceil(args.num_train_epochs * pair_data.epoch_length / per_update)
    schedule_steps = args.lr_schedule_steps or max_train_steps
    rate = args.learning_rate * (per_update if args.scale_lr else 1)
    tell(
        advice.on_settings(
            args.optimizer, rate, args.lr_scheduler, args.lr_warmup_steps, schedule_steps, max_train_steps
        )
    )
    if resume:
        tell(advice.on_resumed_schedule(
            args.lr_scheduler, state.get("lr_schedule_steps"), schedule_steps, state["global_step"], rate, args.lr_warmup_steps,
            args.lr_num_cycles, args.lr_power,
        ))  # fmt: skip
    logging_dir = output_dir / args.logging_dir
    output_dir.mkdir(parents=True, exist_ok=True)

    # ---- encode once, in a process that gives its memory back ------------------------------------
    kind, int8 = precision.resolve_precision(args.mixed_precision), args.base_precision == "int8"
    if kind.storage != kind.compute:
        print("bf16 on the CPU: weights are stored in bf16 and computed in fp32, for want of bf16 matrix products")
    folder = Path(args.cache_dir, "mindtune") if args.cache_dir else output_dir / "cache"
    filter_name = args.image_interpolation_mode
    stage = EncoderStage(root, args.variant, args.mixed_precision, folder, args.max_sequence_length, filter_name, int8=int8)
    more = args.validation_prompt + ([""] if args.proportion_empty_prompts else [])
    images = ()
    if args.cache_latents:
        print("--cache_latents: every pair keeps its centre crop" + (", one entry a flip" if args.random_flip else ""))
        images = PairImages(pair_data, args.random_flip)
    if not args.streaming:
        tell(stage.long_captions(PairCaptions(pair_data, more)))
    encoded = stage.prepare(PairCaptions(pair_data, more), images)
    print(f"encode stage: {encoded} made, the rest already in {stage.cache_dir}")

    # ---- load, freeze, cast ----------------------------------------------------------------------
    transformer = loading.load_model(root, "transformer", kind, args.variant, int8)
    vae = None if args.cache_latents else loading.load_model(root, "vae", kind, args.variant)
    for model in (transformer, *([vae] if vae else [])):
        precision.freeze_params(model)

    # ---- add what trains -------------------------------------------------------------------------
    if existing:
        controlnet = loading.load_model(existing.parent, existing.name, precision.resolve_precision("no"))
    else:
        controlnet = controlnets.flux_controlnet(root, args.num_double_layers, args.num_single_layers, args.variant)
    # MindSpore's optimizers update in the parameter's own precision: float32 parameters, computing in half.
    precision.compute_in(controlnet, kind.compute).set_train(True)
    for parameter in controlnet.get_parameters():
        parameter.requires_grad = True
    for model in (transformer, controlnet):
        flux_blocks.bind(model)  # once more, now that it is known what trains
    if args.gradient_checkpointing:
        for model in (transformer, controlnet):
            for block in (*model.transformer_blocks, *model.single_transformer_blocks):
                block.recompute()
    print(
        precision.parameter_table(
            {"transformer": transformer, "controlnet": controlnet, **({"vae": vae} if vae else {})}, kind
        )
    )

    # ---- the step --------------------------------------------------------------------------------
    vae_config, scheduler_config = configs.read_config(root, "vae"), configs.read_config(root, "scheduler")
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    auto = args.timestep_shift == "auto"
    shift = (
        flow.resolution_shift(max(h * w for h, w in pair_data.buckets) // (2 * factor) ** 2, scheduler_config)
        if auto
        else float(args.timestep_shift)
    )
    sigmas = flow.shift_sigmas(loading.load_scheduler(root).sigmas.asnumpy(), shift)
    batches = Batches(args, seed, stage, pair_data, (vae_config["latent_channels"], factor), len(sigmas))

    weights = loading.model_parameters(controlnet)
    groups = [{"params": list(weights.values()), "lr": rate, "weight_decay": args.adam_weight_decay}]
    make = partial(
        optimizers.create_optimizer, args.optimizer, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, beta3=None,
        decouple=True, use_bias_correction=True, safeguard_warmup=True, eight_bit=args.use_8bit_adam, offload=args.offload_optimizer,
    )  # fmt: skip
    optimizer = zero1.ShardedOptimizer(make, groups) if args.zero_stage else make(groups)
    scaler = precision.loss_scaler(args.mixed_precision)
    step = TrainStepForFluxControlNet(
        controlnet, transformer, optimizer, ms.Tensor(sigmas, ms.float32), kind.compute, args, vae_config, vae, scaler
    )
    ema = averaging.EMA(list(weights.values()), args.ema_decay) if args.use_ema else None
    painter = Painter(args, root, stage, kind, seed, rows, vae, transformer, controlnet)

    # ---- resume ----------------------------------------------------------------------------------
    remembered = {f"optimizer.{k}": p for k, p in optimizers.optimizer_state(optimizer).items()}
    if ema:
        remembered.update({f"ema.{name}": p for name, p in zip(weights, ema.averages)})
    if args.mixed_precision == "fp16":
        remembered.update({"loss_scale": scaler.scale_value, "loss_scale_counter": scaler.counter})
    fingerprint = files.text_digest(pair_data.digests())
    base = encoder_fingerprint(root / "transformer", weight_files(root, "transformer", args.variant))
    identity = {"seed": seed, "data": fingerprint, "base": base, "samples_per_update": per_update}
    if len(pair_data.buckets) > 1:  # a batch is of one bucket
        identity["batch_size"] = args.train_batch_size
    identity.update({k: v for k, v in vars(args).items() if k not in SAME_RUN})
    global_step = 0
    if resume:
        checkpoint.load_state(resume / FOLDER / FINAL, weights)
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

    def averaged():
        return ema.averaged() if ema else contextlib.nullcontext()

    def save_files(folder, values):
        loading.save_model(controlnet, folder / FOLDER, ms.float32)
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
        with averaged():
            if pair_data.held_out and not curve.has(global_step):
                losses = held_out_loss(step, [controlnet], batches.held_out, len(pair_data.held_out))
                curve.add(global_step, [float(sigmas[i]) for i in HELD_OUT_INDICES], losses)
                by_sigma = {f"held_out__loss_at_{sigmas[i]:.3f}": value for i, value in zip(HELD_OUT_INDICES, losses)}
                tracker.log(global_step, held_out__loss=float(np.mean(losses)), **by_sigma)
            if not rows or not global_step:
                return None
            grid = grids.image_grid(painter.draw(), [prompt for prompt, _ in rows])
        tracker.image(global_step, "validation", grid)
        return grids.save_image(grid, output_dir / "samples" / f"{'final' if final else f'step-{global_step:06d}'}.png")

    # ---- the loop --------------------------------------------------------------------------------
    print(f"optimizer state: {optimizers.state_bytes(optimizer):,} bytes on each of {ranks.world_size()} workers")
    print(
        f"{pair_data.epoch_length} {'uses of a stream' if args.streaming else 'pairs'}, {len(pair_data.held_out)} held out; "
        f"batch {args.train_batch_size} x {args.gradient_accumulation_steps} accumulation x {ranks.world_size()} workers; "
        f"{max_train_steps} updates, "
        f"{max_train_steps * per_update / pair_data.epoch_length:.1f} epochs; seed {seed}"
    )
    kept_out = [pair.image.name for pair in pair_data.held_out]
    record = {
        "flags": vars(args), "seed": seed, "versions": tracking.package_versions(), "device": ms.get_context("device_target"),
        "data": {
            "fingerprint": fingerprint, "samples": pair_data.epoch_length, "held_out": kept_out,
            "condition_background": pair_data.background,
        },
        "trainable": {"controlnet": sum(p.size for p in weights.values())}, "workers": ranks.world_size(),
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
    micro = accumulation * ranks.world_size()  # batches of all workers an update
    ahead = batches.iterate(global_step * micro, max_train_steps * micro)
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
            rate,
        )
        optimizers.set_learning_rates(optimizer, [rate * lr_factor])
        losses = [float(step(*inputs)[1]) for inputs in ranks.micro_batches(step, ahead, accumulation)]
        loss, norm = float(np.mean(ranks.all_gather(losses))), float(step.grad_clipper.norm)
        global_step += 1
        if ema:
            ema.update(global_step)
        values = {"loss": loss, "lr": rate * lr_factor, "grad_norm": norm}
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
        bar.set_postfix(
            loss=f"{loss:.4f}", lr=f"{rate * lr_factor:.2e}", s=f"{np.median(seconds[-20:]):.2f}", refresh=False
        )
        bar.update()
        if global_step < max_train_steps:
            if global_step % args.validation_steps == 0:
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
            memory=plan.measured(memory_settings(args, root, existing)),
        )  # fmt: skip

    saved = save()
    if global_step < max_train_steps:
        ranks.on_main_process(finish_run_json, False)
        ranks.on_main_process(report.write_report, output_dir)
        print(
            f"saved {saved} after update {global_step}. Go on with the same command and --resume_from_checkpoint latest"
        )
        ranks.finish()
        return 130  # as a shell reports Ctrl-C
    if ranks.is_main_process():
        dtype = precision.DTYPES["fp32" if args.upcast_before_saving else args.save_weight_dtype]
        with averaged():
            files.write_files_atomically(output_dir, lambda beside: loading.save_model(controlnet, beside, dtype))
        grid, plot = look(final=True), curve.plot()
        tracker.close()
        finish_run_json(True)
        page = report.write_report(output_dir)
        curves = logging_dir if services else output_dir / "metrics.jsonl"
        left = {
            "ControlNet": output_dir / FINAL,
            "picture grid": grid,
            "held-out loss plot": plot,
            "curves": curves,
            "report": page,
        }
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
