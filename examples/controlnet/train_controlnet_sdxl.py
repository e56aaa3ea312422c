"""ControlNet for Stable Diffusion XL on MindSpore: trains a copy of the UNet's first half to follow condition images.

    python train_controlnet_sdxl.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
        --output_dir out --dataset_name fusing/fill50k --resolution 1024 --learning_rate 1e-5 \\
        --validation_image a.png b.png \\
        --validation_prompt "red circle with blue background" "cyan circle with brown floral background" \\
        --train_batch_size 1 --gradient_accumulation_steps 4 --mixed_precision fp16

Writes to the output directory: the ControlNet (config.json and diffusion_pytorch_model.safetensors), checkpoints,
samples/*.png, loss curves for TensorBoard, metrics.jsonl, run.json and report.html. Ctrl-C saves a checkpoint; the same
command with --resume_from_checkpoint latest continues the run, bit for bit on the CPU.
"""

import contextlib
import math
from pathlib import Path

import mindspore as ms
import numpy as np

from mindtune import diffusion, files, flags, flow, rng
from mindtune.cli import run as run_script
from mindtune.cli import tell
from mindtune.data import columns, conditions, crops, pair_data
from mindtune.distributed import ranks
from mindtune.encode.cache import encoder_fingerprint
from mindtune.encode.encoder_stage import Stage
from mindtune.models import configs, controlnets, execution, loading, pipelines, precision, resolve, sampling
from mindtune.models.train_step import TrainStep, train_all_weights
from mindtune.models.weights import weight_files
from mindtune.optim import advice, averaging, optimizers, schedules
from mindtune.run import checkpoint, memory, plan, record, validation

SYSTEM = "controlnet_sdxl"  # what mindtune calls this script
FOLDER = "controlnet"  # of the ControlNet in a checkpoint, as in diffusers
WEIGHTS = "diffusion_pytorch_model.safetensors"

# ---- flags (yours to change) ---------------------------------------------------------------------


def parse_args(argv=None):
    parser = flags.Parser(__doc__)
    flags.model(parser, pipeline="Stable Diffusion XL")
    flags.controlnet(parser, copied="the UNet's first half")
    parser.add("tokenizer_name", help="Directory or hub id of another first tokenizer. Default: the pipeline's.")
    parser.add(
        "pretrained_vae_model_name_or_path",
        help="Directory or hub id of another VAE. Default: the pipeline's, computed in fp32.",
    )
    flags.pairs(parser)
    flags.images(parser, sample="pair", multiple=8, smallest=64)
    parser.section("training step")
    parser.add(
        "crops_coords_top_left_h", type=int, default=0, minimum=0, help="Top of the crop that SDXL is told, in pixels."
    )
    parser.add(
        "crops_coords_top_left_w", type=int, default=0, minimum=0, help="Left of the crop that SDXL is told, in pixels."
    )
    parser.add("snr_gamma", type=float, above=0, help="gamma of Min-SNR weighting, such as 5.0. Default: no weighting.")
    flags.step(parser, sample="pair")
    flags.optimizer(parser, learning_rate=5e-6, adam_weight_decay=1e-2)
    flags.schedule(parser)
    flags.ema(parser)
    flags.output(parser, output_dir="controlnet-model")
    flags.saved_dtype(parser)
    flags.controlnet_validation(parser, num_inference_steps=20)
    parser.add(
        "guidance_scale",
        type=float,
        default=5.0,
        may_change=True,
        help="Scale of classifier-free guidance in validation. 1: none.",
    )
    flags.no_effect(parser, *flags.NO_EFFECT)
    return parser.parse_args(argv)


# ---- checks (machinery) --------------------------------------------------------------------------


def find_models(args):
    """(pipeline, VAE or None, existing ControlNet or None, tokenizer or None), checked. Raises UserError."""
    weights = not args.dry_run
    root = resolve.pipeline(
        args.pretrained_model_name_or_path,
        args.revision,
        args.variant,
        args.cache_dir,
        pipelines.SDXL_COMPONENTS,
        weights=weights,
    )
    vae = resolve.vae(args.pretrained_vae_model_name_or_path, args.cache_dir, root, weights=weights)
    unet = configs.read_config(root, "unet")
    controlnet = resolve.controlnet(args.controlnet_model_name_or_path, args.cache_dir, unet, weights=weights)
    tokenizer = None
    if args.tokenizer_name and weights:
        tokenizer = pipelines.resolve_tokenizer(args.tokenizer_name, "--tokenizer_name", args.cache_dir)
    return root, vae, controlnet, tokenizer


# ---- data (yours to change) ----------------------------------------------------------------------


class Batches:
    """Makes batches from uses of pairs.

    images [B, 2C, h, w] (cached moments) or [B, 3, H, W] (pixels in [-1, 1]), conditions [B, 3, H, W] in [0, 1], posterior noise
    and noise [B, C, h, w], timesteps [B], prompt_embeds [B, L, D].
    """

    def __init__(self, args, stage, latent, num_train_timesteps):
        self.args = args
        self.stage = stage
        self.channels, self.factor = latent
        self.num_train_timesteps = num_train_timesteps

    def make(self, uses):
        """The arrays of a batch."""
        rows = [self.row(*use) for use in uses]
        return tuple(np.stack(column) for column in zip(*rows))

    def row(self, pair, size, draws):
        """What the step takes of one pair, in training and in held-out evaluation."""
        args = self.args
        flip = draws.flip(args.random_flip)
        crop = draws.crop(args.center_crop or args.cache_latents)
        condition = crops.pixel_values(pair.condition.open(), size, args.image_interpolation_mode, crop, flip)
        if args.cache_latents:
            image = self.stage.moments(pair.image, size, flip)
        else:
            image = crops.pixel_values(pair.image.open(), size, args.image_interpolation_mode, crop, flip)
        latent_shape = (self.channels, size[0] // self.factor, size[1] // self.factor)
        posterior_noise = draws.normal("posterior", latent_shape)
        noise = draws.normal("noise", latent_shape)
        timestep = draws.timestep(lambda generator: generator.integers(self.num_train_timesteps))
        text = self.stage.text(draws.caption(pair.caption, args.proportion_empty_prompts))
        return image, (condition + 1.0) / 2.0, posterior_noise, noise, np.int32(timestep), text["prompt_embeds"]


# ---- the training step (yours to change) ---------------------------------------------------------


class TrainStepForControlNetSDXL(TrainStep):
    """One micro-batch: loss, gradients and, every `gradient_accumulation_steps` calls, an update. A pure function of its inputs.

    `alphas` and `weights` are tables over the timesteps [N], float32. `vae` is given if the images come as pixels, and encodes
    them in `vae_dtype`. Returns (scaled loss, loss), scalars.
    """

    def __init__(
        self,
        controlnet,
        optimizer,
        *,
        unet,
        vae,
        alphas,
        weights,
        prediction_type,
        latent_config,
        compute_dtype,
        vae_dtype,
        **settings,
    ):
        super().__init__(controlnet, optimizer, **settings)
        self.controlnet = self.model
        self.unet = unet
        self.vae = vae
        self.alphas = alphas
        self.weights = weights
        self.prediction_type = prediction_type
        self.latent_shift, self.latent_scale = flow.scale_constants(latent_config)
        self.compute_dtype = compute_dtype
        self.vae_dtype = vae_dtype

    def latents(self, images, posterior_noise):
        if self.vae is not None:
            images = self.vae.encode(images.to(self.vae_dtype))[0]
        return (flow.sample_posterior(images, posterior_noise) - self.latent_shift) * self.latent_scale

    def predict(
        self, images, conditions, posterior_noise, noise, timesteps, prompt_embeds, pooled_prompt_embeds, time_ids
    ):
        """Prediction and target [B, C, h, w], and weights [B, 1, 1, 1]."""
        latents, alphas = self.latents(images, posterior_noise), flow.get_sigmas(self.alphas, timesteps)
        noisy = diffusion.add_noise(latents, noise, alphas).to(self.compute_dtype)
        text = prompt_embeds.to(self.compute_dtype)
        down, mid = self.controlnet(noisy, timesteps, text, conditions.to(self.compute_dtype), return_dict=False)
        prediction = self.unet(
            noisy,
            timesteps,
            text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]
        target = diffusion.target(latents, noise, alphas, self.prediction_type)
        return prediction, target, flow.get_sigmas(self.weights, timesteps)

    def forward(
        self, images, conditions, posterior_noise, noise, timesteps, prompt_embeds, pooled_prompt_embeds, time_ids
    ):
        prediction, target, weights = self.predict(images, conditions, posterior_noise, noise, timesteps, prompt_embeds)
        loss = flow.weighted_mse(prediction, target, weights)
        return self.scale_loss(loss), loss


# ---- validation (yours to change) ----------------------------------------------------------------


class ValidationSampler:
    """Samples images for pairs of a prompt and a condition image, always from the same noise."""

    def __init__(self, args, prompts, stage, scheduler, *, seed, unet, controlnet, vae):
        self.args = args
        self.prompts = prompts
        self.stage = stage
        self.scheduler = scheduler
        self.seed = seed
        self.unet = unet
        self.controlnet = controlnet
        self.vae = vae

    def sample(self, final):
        """A row per pair: the condition image and --num_validation_images samples. The label is the prompt."""
        vae = self.stage.load_vae() if self.vae is None else self.vae
        with execution.eval_mode(self.controlnet):
            rows = [[condition, *self.images(vae, prompt, condition)] for prompt, condition in self.prompts]
        return rows, [prompt for prompt, _ in self.prompts]

    def images(self, vae, prompt, condition):
        args = self.args
        pixels = conditions.condition_pixels(condition)
        shape = sampling.latent_shape(vae, pixels)
        for number in range(args.num_validation_images):
            latents = sampling.sample_unet_latents(
                self.unet,
                self.scheduler,
                self.stage.text(prompt),
                self.stage.unconditional(),
                rng.normal(self.seed, "validation", number, shape=shape),
                args.num_inference_steps,
                args.guidance_scale,
                precision.resolve_precision(args.mixed_precision).compute,
                (self.controlnet, pixels, args.controlnet_conditioning_scale),
            )
            yield sampling.decode_latents(vae, latents, precision.resolve_precision(self.stage.vae_precision).compute)[
                0
            ]


# ---- main (machinery) ----------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)

    # ---- check ----
    if args.dry_run:
        root, _, existing, _ = find_models(args)
        settings = args.select(memory.Settings, system=SYSTEM, root=root, controlnet=existing)
        print(plan.describe(settings, args.device_memory_gb))
        return 0
    execution.set_up_device(graph_mode=args.mindspore_mode == 0)
    ranks.set_up(args.distributed)
    run = record.Run(args.select(record.Settings), args.recorded(), results=("config.json", WEIGHTS))
    files.require_writable("--cache_dir", args.cache_dir)
    root, vae_folder, existing, tokenizer = find_models(args)
    scheduler_config = configs.read_config(root, "scheduler")
    alphas = diffusion.alphas_cumprod(scheduler_config)
    prediction_type = diffusion.prediction_type(scheduler_config)
    prompts = validation.match_conditions(args.validation_prompt, args.validation_image)
    data = pair_data.load(args.select(columns.Source), args.select(pair_data.Settings), run.seed)
    prompts = validation.load_conditions(prompts, args.resolution, 8, data.background)
    samples_per_update = args.train_batch_size * args.gradient_accumulation_steps * ranks.world_size()
    max_train_steps = args.max_train_steps or math.ceil(args.num_train_epochs * data.epoch_length / samples_per_update)
    schedule = args.select(
        schedules.Schedule,
        base=args.learning_rate * (samples_per_update if args.scale_lr else 1),
        length=args.lr_schedule_steps or max_train_steps,
    )
    tell(advice.on_settings(args.optimizer, schedule, max_train_steps))
    tell(advice.on_resume(schedule, run.state.get("lr_schedule_steps"), run.step))

    # ---- encode ----
    dtypes = precision.resolve_precision(args.mixed_precision)
    stage = Stage(
        root,
        args.variant,
        args.mixed_precision,
        Path(args.cache_dir, "mindtune") if args.cache_dir else run.output_dir / "cache",
        77,
        interpolation=args.image_interpolation_mode,
        kind="sd",
        tokenizer=tokenizer,
    )
    empty = [""] if args.proportion_empty_prompts or prompts else []
    captions = data.captions(args.validation_prompt + empty)
    images = data.images(args.random_flip, conditions=False) if args.cache_latents else ()
    if not args.streaming:
        tell(stage.long_captions(captions))
    encoded = stage.prepare(captions, images)
    print(f"encoder stage: {encoded} encoded, the rest was in {stage.folder}")

    # ---- load, freeze, cast ----
    unet = loading.load_model(root, "unet", dtypes, args.variant)
    vae = None if args.cache_latents else stage.load_vae()
    precision.freeze_params(unet)
    if vae is not None:
        precision.freeze_params(vae)

    # ---- add what is trained ----
    if existing:
        controlnet = loading.load_model(existing.parent, existing.name, precision.resolve_precision("no"))
    else:
        controlnet = controlnets.unet_controlnet(unet, run.seed)
    weights = train_all_weights(controlnet, dtypes.compute)
    if args.gradient_checkpointing:
        controlnets.recompute_unet(unet)
        controlnets.recompute_unet(controlnet)
    print(precision.parameter_table({"unet": unet, "controlnet": controlnet, "vae": vae}, dtypes))

    # ---- step and optimizer ----
    optimizer = optimizers.create_optimizer(
        args.select(optimizers.Settings),
        [{"params": list(weights.values()), "lr": schedule.base, "weight_decay": args.adam_weight_decay}],
    )
    scaler = precision.loss_scaler(args.mixed_precision)
    vae_config = configs.read_config(stage.vae.parent, stage.vae.name)
    loss_weights = diffusion.min_snr_weights(alphas, args.snr_gamma, prediction_type)
    step = TrainStepForControlNetSDXL(
        controlnet,
        optimizer,
        unet=unet,
        vae=vae,
        alphas=ms.Tensor(alphas, ms.float32),
        weights=ms.Tensor(loss_weights, ms.float32),
        prediction_type=prediction_type,
        latent_config=vae_config,
        compute_dtype=dtypes.compute,
        vae_dtype=precision.resolve_precision(stage.vae_precision).compute,
        loss_scaler=scaler,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        max_grad_norm=args.max_grad_norm,
    )
    ema = averaging.EMA(list(weights.values()), args.ema_decay) if args.use_ema else None
    batches = Batches(args, stage, configs.latent_layout(vae_config), len(alphas))

    # ---- resume ----
    identity = {
        "data": data.fingerprint(),
        "base": encoder_fingerprint(root / "unet", weight_files(root, "unet", args.variant)),
        "samples_per_update": samples_per_update,
        **({"batch_size": args.train_batch_size} if len(data.sizes) > 1 else {}),  # a batch is of one bucket
        **args.fixed(),
    }
    if run.checkpoint:
        checkpoint.load_state(run.checkpoint / FOLDER / WEIGHTS, weights)
    averages = dict(zip(weights, ema.averages)) if ema else {}
    run.resume(identity, optimizers.training_state(optimizer, scaler, ema=averages))

    # ---- train ----
    run.start(
        data=data,
        trainable={"controlnet": sum(parameter.size for parameter in weights.values())},
        max_train_steps=max_train_steps,
        schedule_length=schedule.length,
        settings=args.select(memory.Settings, system=SYSTEM, root=root, controlnet=existing),
        write_weights=lambda folder: loading.save_model(controlnet, folder / FOLDER, ms.float32),
        axis="timestep",
    )
    sampler = ValidationSampler(
        args, prompts, stage, scheduler_config, seed=run.seed, unet=unet, controlnet=controlnet, vae=vae
    )
    validate = validation.Validation(
        run,
        step,
        [controlnet],
        make_batch=batches.make,
        places=np.arange(len(alphas)) / len(alphas),
        sample=sampler.sample if prompts else None,
        weights=ema.averaged if ema else contextlib.nullcontext,
    )
    if not run.checkpoint:
        validate()
    per_update = args.gradient_accumulation_steps * ranks.world_size()
    micro_batches = data.iterate(
        run.step * per_update, max_train_steps * per_update, batches.make, args.dataloader_num_workers
    )
    while run.step < max_train_steps and not run.stopped():
        rate = schedule.rate(run.step)
        optimizers.set_learning_rates(optimizer, [rate])
        losses = []
        for inputs in ranks.micro_batches(step, micro_batches, args.gradient_accumulation_steps):
            losses.append(float(step(*inputs)[1]))  # the last of these calls updates the weights
        if ema:
            ema.update(run.step + 1)
        run.update(losses, lr=rate, grad_norm=step.grad_clipper.norm, **optimizers.logged_values(optimizer, scaler))
        if run.due(args.validation_steps):
            validate()
        if run.due(args.checkpointing_steps):
            run.save()  # after the validation, which a run that is resumed here would miss

    # ---- finish ----
    run.save()
    if run.step < max_train_steps:
        return run.stop()
    results = {}
    if ranks.is_main_process():
        dtype = precision.DTYPES["fp32" if args.upcast_before_saving else args.save_weight_dtype]
        with validate.weights():
            files.write_files_atomically(run.output_dir, lambda folder: loading.save_model(controlnet, folder, dtype))
        results = {"ControlNet": run.output_dir / WEIGHTS, "validation images": validate(final=True)}
    return run.finish(results)


if __name__ == "__main__":
    run_script(main)
