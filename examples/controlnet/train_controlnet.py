"""ControlNet for Stable Diffusion 1.5 and 2 on MindSpore: trains a copy of the UNet's first half.

    python train_controlnet.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --output_dir out --dataset_name fusing/fill50k --resolution 512 --learning_rate 1e-5 \\
        --validation_image a.png b.png \\
        --validation_prompt "red circle with blue background" "cyan circle with brown floral background" \\
        --train_batch_size 1 --gradient_accumulation_steps 4 --mixed_precision fp16

Writes to the output directory: the ControlNet (config.json and diffusion_pytorch_model.safetensors), checkpoints,
samples/*.png, loss curves for TensorBoard, metrics.jsonl, run.json and report.html. Ctrl-C saves a checkpoint; the same
command with --resume_from_checkpoint latest continues the run, bit for bit on the CPU.
"""

import mindspore as ms
import numpy as np

from mindtune import diffusion, files, flow, rng
from mindtune.cli import print_lines, run_script
from mindtune.data import columns, conditions, order, pair_data
from mindtune.data.image_facts import ImageFacts
from mindtune.data.pairs import load_pairs
from mindtune.distributed import ranks
from mindtune.encode import windows
from mindtune.encode.cache import component_fingerprint
from mindtune.encode.encoder_stage import EncoderStage
from mindtune.flags import data_flags, image_flags, optimizer_flags, output_flags, training_flags
from mindtune.flags.parser import NO_EFFECT, Parser
from mindtune.models import configs, controlnets, execution, loading, pipelines, precision, resolve, sampling
from mindtune.models.gradient_checkpointing import recompute_blocks
from mindtune.models.train_step import TrainStep, train_all_weights
from mindtune.optim import advice, averaging, optimizers, schedules
from mindtune.run import checkpoint, disk, memory, plan, record, validation, validation_rows

FOLDER = "controlnet"  # the folder of the ControlNet in a checkpoint, as in diffusers

# ---- flags (yours to change) ---------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(__doc__)
    training_flags.model(parser, pipeline="Stable Diffusion")
    training_flags.controlnet(parser, copied="the UNet's first half")
    parser.add("tokenizer_name", help="Directory or hub id of another tokenizer. Default: the pipeline's.")
    data_flags.pairs(parser)
    image_flags.images(parser, sample="pair", multiple=8, smallest=64)
    parser.section("training step")
    parser.add("snr_gamma", type=float, above=0, help="gamma of Min-SNR weighting, such as 5.0. Default: no weighting.")
    training_flags.loss(parser)
    training_flags.step(parser, sample="pair")
    optimizer_flags.optimizer(parser, learning_rate=5e-6, adam_weight_decay=1e-2)
    optimizer_flags.schedule(parser)
    optimizer_flags.ema(parser)
    output_flags.output(parser, output_dir="controlnet-model")
    output_flags.saved_dtype(parser)
    output_flags.controlnet_validation(parser, num_inference_steps=20)
    output_flags.guidance(parser, guidance_scale=7.5)
    output_flags.no_effect(parser, *NO_EFFECT)
    return parser.parse_args(argv)


# ---- checks (machinery) --------------------------------------------------------------------------


def find_models(args):
    """Returns the directories (pipeline, existing ControlNet or None, tokenizer or None), after checks.

    Raises UserError.
    """
    root = resolve.pipeline(
        args.pretrained_model_name_or_path,
        args.revision,
        args.variant,
        args.cache_dir,
        pipelines.SD_COMPONENTS,
        weights=not args.dry_run,
        hub=args.hub,
    )
    unet = configs.read_config(root, "unet")
    existing = resolve.controlnet(
        args.controlnet_model_name_or_path, args.cache_dir, unet, weights=not args.dry_run, hub=args.hub
    )
    tokenizer = None if args.dry_run else resolve.tokenizer(args.tokenizer_name, args.cache_dir, args.hub)
    return root, existing, tokenizer


# ---- data (yours to change) ----------------------------------------------------------------------


class Batches:
    """Makes the inputs of the training step for a batch of pairs.

    images [B, 2C, h, w] (the VAE's mean and log-variance, from the cache) or [B, 3, H, W] (pixels in [-1, 1]),
    conditions [B, 3, H, W] in [0, 1],
    posterior noise and noise [B, C, h, w], timesteps [B], prompt_embeds [B, L, D].
    """

    def __init__(self, args, stage, vae_config, num_train_timesteps):
        self.args = args
        self.stage = stage
        self.channels, self.factor = configs.latent_layout(vae_config)
        self.num_train_timesteps = num_train_timesteps

    def make(self, uses):
        """The arrays of a batch, from its `PairUse`s, which all have the same size."""
        return order.stack([self.row(*use) for use in uses])

    def row(self, pair, size, draws, caption):
        """The inputs of the training step for one pair, for training and for the held-out loss alike."""
        args = self.args
        flip = draws.flip(args.random_flip)
        crop = draws.crop(args.center_crop or args.cache_latents)  # cached latents are those of the center crop
        image = self.stage.image(pair.image, size, crop=crop, flip=flip, cached=args.cache_latents)
        condition = self.stage.image(pair.condition, size, crop=crop, flip=flip, cached=False)
        text = self.stage.text(caption)
        latent_shape = (self.channels, size[0] // self.factor, size[1] // self.factor)
        return (
            image,
            (condition + 1.0) / 2.0,
            draws.normal("posterior", latent_shape),
            draws.normal("noise", latent_shape),
            np.int32(draws.timestep(lambda generator: generator.integers(self.num_train_timesteps))),
            text["prompt_embeds"],
        )


# ---- the training step (yours to change) ---------------------------------------------------------


class TrainStepForControlNet(TrainStep):
    """One micro-batch: loss, gradients and, every `gradient_accumulation_steps` calls, an update of the ControlNet.

    It draws no random numbers. `vae` is None if the latents are cached. Returns (scaled loss, loss), scalars.
    """

    def __init__(self, controlnet, optimizer, scaler, args, *, unet, vae, vae_config, scheduler_config):
        super().__init__(
            controlnet,
            optimizer,
            loss_scaler=scaler,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            max_grad_norm=args.max_grad_norm,
        )
        self.controlnet = self.model
        self.unet = unet
        self.vae = vae
        self.compute_dtype = precision.resolve_precision(args.mixed_precision).compute
        self.latent_shift, self.latent_scale = flow.scale_constants(vae_config)
        alphas = diffusion.alphas_cumprod(scheduler_config)
        self.prediction_type = diffusion.prediction_type(scheduler_config)
        # Tables [N] over the timesteps, read by `get_sigmas`: noise schedule, weights of the loss, Huber's delta.
        self.alphas = ms.Tensor(alphas, ms.float32)
        self.weights = ms.Tensor(diffusion.min_snr_weights(alphas, args.snr_gamma, self.prediction_type), ms.float32)
        self.deltas = ms.Tensor(diffusion.huber_deltas(args.huber_schedule, args.huber_delta, alphas), ms.float32)
        self.args = flow.AttrJitWrapper(loss=args.loss)

    def predict(self, images, conditions, posterior_noise, noise, timesteps, prompt_embeds):
        """Returns prediction and target [B, C, h, w], and the weights of the loss [B, 1, 1, 1]."""
        if self.vae is not None:
            images = self.vae.encode(images.to(self.compute_dtype))[0]
        latents = (flow.sample_posterior(images, posterior_noise) - self.latent_shift) * self.latent_scale
        alphas = flow.get_sigmas(self.alphas, timesteps)
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

    def forward(self, images, conditions, posterior_noise, noise, timesteps, prompt_embeds):
        prediction, target, weights = self.predict(images, conditions, posterior_noise, noise, timesteps, prompt_embeds)
        deltas = flow.get_sigmas(self.deltas, timesteps)
        loss = flow.sample_losses(prediction, target, weights, self.args.loss, deltas).mean()
        return self.scale_loss(loss), loss


# ---- validation (yours to change) ----------------------------------------------------------------


class ValidationSampler:
    """Samples the images of `rows`, from the same noise in every validation."""

    def __init__(self, args, rows, stage, models, scheduler_config):
        self.args = args
        self.rows = rows
        self.stage = stage
        self.models = models
        self.scheduler_config = scheduler_config

    def sample(self, final):  # the final validation has no other images
        """Returns the images of all rows."""
        vae = self.stage.load_vae() if self.models["vae"] is None else self.models["vae"]
        with execution.eval_mode(self.models["controlnet"]):
            return {"ControlNet": [self.image(vae, row) for row in self.rows]}

    def image(self, vae, row):
        """Samples one image. Guidance moves away from the negative prompt, or without one from the empty prompt."""
        compute_dtype = precision.resolve_precision(self.args.mixed_precision).compute
        pixels = conditions.condition_pixels(row.condition)
        latents = sampling.sample_unet_latents(
            self.models["unet"],
            self.scheduler_config,
            self.stage.text(row.prompt),
            self.stage.text(row.negative_prompt or ""),
            rng.normal(row.seed, "validation", row.number, shape=sampling.latent_shape(vae, row.size)),
            row.steps,
            row.guidance,
            compute_dtype,
            (self.models["controlnet"], pixels, row.scale),
        )
        return sampling.decode_latents(vae, latents, compute_dtype)[0]


# ---- main (machinery) ----------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)

    # ---- check ----
    if args.dry_run:
        root, existing, _ = find_models(args)
        settings = args.select(memory.Settings, system="controlnet", root=root, controlnet=existing)
        print(plan.describe(settings))
        print(disk.describe(args.select(disk.Settings), settings, lambda: load_pairs(args.select(columns.Source))))
        return 0
    execution.set_up_device(graph_mode=args.mindspore_mode == 0)
    ranks.set_up(args.distributed)
    run = record.Run(args.select(record.Settings), args.recorded(), ("config.json", loading.WEIGHTS), args.defaults())
    files.require_writable("--cache_dir", args.cache_dir)
    root, existing, tokenizer = find_models(args)
    rows = validation_rows.read(args.select(validation_rows.Settings, system="controlnet", seed=run.seed))
    settings = args.select(memory.Settings, system="controlnet", root=root, controlnet=existing)
    plan.check_fit(settings)
    scheduler_config = configs.read_config(root, "scheduler")
    num_train_timesteps = len(diffusion.alphas_cumprod(scheduler_config))
    cache_dir = files.encoder_cache(args.cache_dir, run.output_dir)
    facts = ImageFacts(cache_dir, args.verify_data)
    data = pair_data.load(args.select(columns.Source), args.select(pair_data.Settings), run.seed, facts)
    run.set_data(data)
    rows = validation_rows.load_conditions(rows, args.resolution, 8, data.background)
    schedule = schedules.create(args.select(schedules.Settings), run.samples_per_update, run.max_train_steps)
    print_lines(advice.on_schedule(args.optimizer, schedule, run.max_train_steps, run.state))

    # ---- encode ----
    stage = EncoderStage(
        system="sd",
        root=root,
        variant=args.variant,
        precision=args.mixed_precision,
        cache_dir=cache_dir,
        verify=args.verify_data,
        max_sequence_length=77,
        interpolation=args.image_interpolation_mode,
        tokenizer=tokenizer,
    )
    # Validation needs the empty prompt for guidance.
    captions = validation_rows.captions(rows) + ([""] if rows else [])
    encoded = windows.encode(
        stage, data, args.select(windows.Settings), run.batch_range(), run.batches_per_update, captions
    )

    # ---- load, freeze, cast ----
    dtypes = precision.resolve_precision(args.mixed_precision)
    unet = loading.load_model(root, "unet", dtypes, args.variant)
    vae = None if args.cache_latents else loading.load_model(root, "vae", dtypes, args.variant)
    precision.freeze_params(unet, vae)

    # ---- add what is trained ----
    controlnet = controlnets.load_controlnet(existing) if existing else controlnets.unet_controlnet(unet, run.seed)
    weights = train_all_weights(controlnet, dtypes.compute)
    recompute_blocks(memory.recomputed_blocks(settings), controlnet, unet)
    models = {"unet": unet, "controlnet": controlnet, "vae": vae}
    print(precision.parameter_table(models, dtypes))

    # ---- step and optimizer ----
    vae_config = configs.read_config(root, "vae")
    groups = [{"params": list(weights.values()), "lr": schedule.base, "weight_decay": args.adam_weight_decay}]
    optimizer = optimizers.create_optimizer(args.select(optimizers.Settings), groups)
    scaler = precision.loss_scaler(args.mixed_precision)
    step = TrainStepForControlNet(
        controlnet,
        optimizer,
        scaler,
        args,
        unet=unet,
        vae=vae,
        vae_config=vae_config,
        scheduler_config=scheduler_config,
    )
    batches = Batches(args, stage, vae_config, num_train_timesteps)
    ema = averaging.EMA(list(weights.values()), args.ema_decay) if args.use_ema else None

    # ---- resume ----
    state = optimizers.training_state(optimizer, scaler, ema=dict(zip(weights, ema.averages)) if ema else {})
    if run.checkpoint:  # the weights have a file of their own, which diffusers can load
        checkpoint.load_state(run.checkpoint / FOLDER / loading.WEIGHTS, weights)
    run.resume(args.fixed(), component_fingerprint(root, "unet", args.variant), state)

    # ---- train ----
    run.start(
        settings,
        schedule.length,
        write_weights=lambda folder: loading.save_model(controlnet, folder / FOLDER, ms.float32),
        trainable={"controlnet": sum(parameter.size for parameter in weights.values())},
        axis="timestep",
    )
    sampler = ValidationSampler(args, rows, stage, models, scheduler_config)
    places = np.arange(num_train_timesteps) / num_train_timesteps  # on the axis of the held-out plot
    validate = validation.Validation(run, step, [controlnet], batches.make, places, sampler, ema)
    if not run.checkpoint:
        validate()
    micro_batches = encoded.iterate(batches.make)
    while run.step < run.max_train_steps and not run.stopped():
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
            run.save()  # after validation, because a run that is resumed from here does not repeat it

    # ---- finish ----
    run.save()
    if run.step < run.max_train_steps:
        return run.stop()
    dtype = precision.DTYPES["fp32" if args.upcast_before_saving else args.save_weight_dtype]
    validate.write_result(lambda folder: loading.save_model(controlnet, folder, dtype))
    return run.finish("ControlNet", run.output_dir / loading.WEIGHTS, validate(final=True))


if __name__ == "__main__":
    run_script(main)
