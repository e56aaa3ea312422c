"""ControlNet for FLUX.1 on MindSpore: trains a copy of the transformer's first blocks to follow condition images.

    python train_controlnet_flux.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev \\
        --dataset_name fusing/fill50k --conditioning_image_column conditioning_image --image_column image \\
        --caption_column text --output_dir out --mixed_precision bf16 --resolution 512 --train_batch_size 1 \\
        --cache_latents --max_train_steps 15000

Writes the ControlNet (config.json and diffusion_pytorch_model.safetensors) to the output directory, and checkpoints,
samples/*.png, loss curves for TensorBoard, metrics.jsonl, run.json and report.html. Ctrl-C saves a checkpoint. The same
command with --resume_from_checkpoint latest continues the run, bit for bit on the CPU.
"""

import mindspore as ms
import numpy as np
from mindspore import ops

from mindtune import files, flow
from mindtune.cli import UserError, print_lines, run_script
from mindtune.data import columns, order, pair_data
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
from mindtune.models.shared_blocks import use_shared_blocks
from mindtune.models.train_step import TrainStep, train_all_weights
from mindtune.optim import advice, averaging, optimizers, schedules
from mindtune.run import checkpoint, disk, memory, plan, record, validation, validation_rows

FOLDER = "flux_controlnet"  # the folder of the ControlNet in a checkpoint, as in diffusers

# ---- flags (yours to change) ---------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(__doc__)
    training_flags.model(parser, pipeline="FLUX.1")
    training_flags.controlnet(parser, copied="the transformer's first blocks")
    parser.add("num_double_layers", type=int, default=4, minimum=0, help="Number of double blocks of a new ControlNet.")
    parser.add("num_single_layers", type=int, default=4, minimum=0, help="Number of single blocks of a new ControlNet.")
    data_flags.pairs(parser)
    image_flags.images(parser, sample="pair", multiple=16, smallest=16)
    training_flags.flux(parser, weighting_scheme="logit_normal")
    training_flags.loss(parser)
    training_flags.step(parser, sample="pair")
    optimizer_flags.optimizer(parser, learning_rate=5e-6, adam_weight_decay=1e-2)
    optimizer_flags.schedule(parser)
    optimizer_flags.ema(parser)
    output_flags.output(parser, output_dir="flux-controlnet")
    output_flags.saved_dtype(parser)
    output_flags.controlnet_validation(parser, num_inference_steps=28)
    output_flags.no_effect(parser, *NO_EFFECT)
    args = parser.parse_args(argv)
    if args.num_double_layers + args.num_single_layers == 0:
        raise UserError("--num_double_layers 0 --num_single_layers 0: nothing to train; give at least one block.")
    return args


# ---- checks (machinery) --------------------------------------------------------------------------


def find_models(args):
    """Returns (pipeline directory, directory of an existing ControlNet or None), after checks. Raises UserError."""
    weights, cache_dir, hub = not args.dry_run, args.cache_dir, args.hub
    name, revision, variant = args.pretrained_model_name_or_path, args.revision, args.variant
    root = resolve.pipeline(name, revision, variant, cache_dir, pipelines.FLUX_COMPONENTS, weights=weights, hub=hub)
    base = configs.read_config(root, "transformer")
    existing = resolve.controlnet(args.controlnet_model_name_or_path, cache_dir, base, weights=weights, hub=hub)
    if args.dry_run:  # the plan is for any number of blocks
        return root, existing
    if existing:
        print("--num_double_layers and --num_single_layers have no effect with --controlnet_model_name_or_path")
        return root, existing
    for flag, key in (("num_double_layers", "num_layers"), ("num_single_layers", "num_single_layers")):
        if getattr(args, flag) > base[key]:
            raise UserError(
                f"--{flag} {getattr(args, flag)}: the transformer has only {base[key]} of these blocks. Give fewer."
            )
    return root, None


# ---- data (yours to change) ----------------------------------------------------------------------


class Batches:
    """Makes the inputs of the training step for a batch of pairs.

    images and conditions [B, 2C, h, w] (the VAE's mean and log-variance, from the cache) or [B, 3, H, W] (pixels in
    [-1, 1]); posterior noise of both and noise [B, C, h, w]; indices of timesteps [B]; prompt_embeds [B, L, D];
    pooled_prompt_embeds [B, P]; and image ids [T, 3].
    """

    def __init__(self, args, stage, vae_config, sizes, num_train_timesteps):
        self.args = args
        self.stage = stage
        self.channels, self.factor = configs.latent_layout(vae_config)
        self.sizes = sizes
        self.num_train_timesteps = num_train_timesteps

    def make(self, uses):
        """The arrays of a batch, from its `PairUse`s, which all have the same size."""
        _, height, width = self.latent_shape(uses[0].size)
        return *order.stack([self.row(*use) for use in uses]), flow.latent_image_ids(height, width)

    def latent_shape(self, size):
        """(C, h, w) of the latents of a crop of `size` (height, width) in pixels."""
        return self.channels, size[0] // self.factor, size[1] // self.factor

    def row(self, pair, size, draws, caption):
        """The inputs of the training step for one pair, for training and for the held-out loss alike."""
        args, shape = self.args, self.latent_shape(size)
        # The image and its condition are cropped and flipped alike.
        options = {
            "crop": draws.crop(args.center_crop),
            "flip": draws.flip(args.random_flip),
            "cached": args.cache_latents,
        }
        index = self.sizes.index(size) * self.num_train_timesteps + draws.timestep(self.timestep)
        text = self.stage.text(caption)
        return (
            self.stage.image(pair.image, size, **options),
            self.stage.image(pair.condition, size, **options),
            draws.normal("posterior", shape),
            draws.normal("condition posterior", shape),
            draws.normal("noise", shape),
            np.int32(index),
            text["prompt_embeds"],
            text["pooled_prompt_embeds"],
        )

    def timestep(self, generator):
        """Draws the index of a timestep from the distribution of --weighting_scheme."""
        args = self.args
        u = flow.sample_density(generator, args.weighting_scheme, args.logit_mean, args.logit_std, args.mode_scale)
        return flow.density_to_index(u, self.num_train_timesteps)


# ---- the training step (yours to change) ---------------------------------------------------------


class TrainStepForFluxControlNet(TrainStep):
    """One micro-batch: loss, gradients and, every `gradient_accumulation_steps` calls, an update of the ControlNet.

    It draws no random numbers. `sigmas` [S, N] has the sigma of every timestep for each size. `vae` is None if the
    latents are cached. Returns (scaled loss, loss), scalars.
    """

    def __init__(self, controlnet, optimizer, scaler, args, *, transformer, vae, vae_config, sigmas):
        super().__init__(
            controlnet,
            optimizer,
            loss_scaler=scaler,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            max_grad_norm=args.max_grad_norm,
        )
        self.controlnet = self.model
        self.transformer = transformer
        self.vae = vae
        self.sigmas, self.deltas = flow.timestep_tables(sigmas, args.huber_schedule, args.huber_delta)
        self.compute_dtype = precision.resolve_precision(args.mixed_precision).compute
        # Read here, because a graph cannot read a dict such as a config.
        self.latent_shift, self.latent_scale = flow.scale_constants(vae_config)
        self.controlnet_guidance = controlnet.config["guidance_embeds"]
        self.transformer_guidance = transformer.config["guidance_embeds"]
        self.text_ids = ms.Tensor(np.zeros((args.max_sequence_length, 3), np.float32))
        self.args = flow.AttrJitWrapper(
            weighting_scheme=args.weighting_scheme, loss=args.loss, guidance_scale=args.guidance_scale
        )

    def latents(self, images, posterior_noise):
        """Scaled latents [B, C, h, w], float32, of pixels or of the VAE's mean and log-variance."""
        if self.vae is not None:
            images = self.vae.encode(images.to(self.compute_dtype))[0]
        return (flow.sample_posterior(images, posterior_noise) - self.latent_shift) * self.latent_scale

    def predict(
        self, images, conditions, posterior_noise, condition_noise, noise, indices, prompt_embeds, pooled, image_ids
    ):
        """Returns the prediction in the compute dtype and its float32 target, [B, C, h, w], and sigmas [B, 1, 1, 1]."""
        latents = self.latents(images, posterior_noise)
        condition = flow.pack_latents(self.latents(conditions, condition_noise)).to(self.compute_dtype)
        sigmas = flow.get_sigmas(self.sigmas, indices)
        noisy = flow.pack_latents(sigmas * noise + (1.0 - sigmas) * latents).to(self.compute_dtype)
        timestep = sigmas.reshape((-1,))  # FLUX takes t / 1000, which equals sigma
        guidance = ops.full((1,), self.args.guidance_scale, dtype=ms.float32).broadcast_to((noise.shape[0],))
        pooled, text = pooled.to(self.compute_dtype), prompt_embeds.to(self.compute_dtype)
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
        self, images, conditions, posterior_noise, condition_noise, noise, indices, prompt_embeds, pooled, image_ids
    ):
        prediction, target, sigmas = self.predict(
            images, conditions, posterior_noise, condition_noise, noise, indices, prompt_embeds, pooled, image_ids
        )
        weighting = flow.loss_weighting(self.args.weighting_scheme, sigmas)
        deltas = flow.get_sigmas(self.deltas, indices)
        loss = flow.sample_losses(prediction, target, weighting, self.args.loss, deltas).mean()
        return self.scale_loss(loss), loss


# ---- validation (yours to change) ----------------------------------------------------------------


class ValidationSampler:
    """Samples the images of `rows`, from the same noise in every validation."""

    def __init__(self, args, rows, root, stage, models):
        self.args = args
        self.rows = rows
        self.root = root
        self.stage = stage
        self.models = models
        self.scheduler_config = configs.read_config(root, "scheduler")
        self.dtypes = precision.resolve_precision(args.mixed_precision)

    def sample(self, final):  # the final validation has no other images
        """Returns the images of all rows."""
        vae = self.models["vae"]
        if vae is None:
            vae = loading.load_model(self.root, "vae", self.dtypes, self.args.variant)
        with execution.eval_mode(self.models["controlnet"]):
            return {"ControlNet": [self.image(vae, row) for row in self.rows]}

    def image(self, vae, row):
        """Samples one image."""
        text, transformer, compute = self.stage.text(row.prompt), self.models["transformer"], self.dtypes.compute
        inputs = row.sampling()
        inputs["control"] = self.models["controlnet"], sampling.encode_image(vae, row.condition, compute), row.scale
        return sampling.flux_image(transformer, vae, self.scheduler_config, text, compute, **inputs)


# ---- main (machinery) ----------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)

    # ---- check ----
    if args.dry_run:
        root, existing = find_models(args)
        settings = args.select(memory.Settings, system="flux_controlnet", root=root, controlnet=existing)
        print(plan.describe(settings))
        print(disk.describe(args.select(disk.Settings), settings, lambda: load_pairs(args.select(columns.Source))))
        return 0
    execution.set_up_device(graph_mode=args.mindspore_mode == 0)
    ranks.set_up(args.distributed)
    run = record.Run(args.select(record.Settings), args.recorded(), ("config.json", loading.WEIGHTS), args.defaults())
    files.require_writable("--cache_dir", args.cache_dir)
    root, existing = find_models(args)
    settings = args.select(memory.Settings, system="flux_controlnet", root=root, controlnet=existing)
    plan.check_fit(settings)
    rows = validation_rows.read(args.select(validation_rows.Settings, system="flux_controlnet", seed=run.seed))
    cache_dir = files.encoder_cache(args.cache_dir, run.output_dir)
    facts = ImageFacts(cache_dir, args.verify_data)
    data = pair_data.load(
        args.select(columns.Source), args.select(pair_data.Settings), run.seed, facts, encode_conditions=True
    )
    run.set_data(data)
    rows = validation_rows.load_conditions(rows, args.resolution, 16, data.background)
    schedule = schedules.create(args.select(schedules.Settings), run.samples_per_update, run.max_train_steps)
    print_lines(advice.on_schedule(args.optimizer, schedule, run.max_train_steps, run.state))

    # ---- encode ----
    stage = EncoderStage(
        root=root,
        variant=args.variant,
        precision=args.mixed_precision,
        cache_dir=cache_dir,
        verify=args.verify_data,
        max_sequence_length=args.max_sequence_length,
        interpolation=args.image_interpolation_mode,
        int8=args.base_precision == "int8",
    )
    captions = validation_rows.captions(rows)
    encoded = windows.encode(
        stage, data, args.select(windows.Settings), run.batch_range(), run.batches_per_update, captions
    )

    # ---- load, freeze, cast ----
    dtypes = precision.resolve_precision(args.mixed_precision)
    transformer = loading.load_model(root, "transformer", dtypes, args.variant, args.base_precision == "int8")
    vae = None if args.cache_latents else loading.load_model(root, "vae", dtypes, args.variant)
    precision.freeze_params(transformer, vae)

    # ---- add what is trained ----
    if existing:
        controlnet = controlnets.load_controlnet(existing)
    else:
        controlnet = controlnets.flux_controlnet(root, args.num_double_layers, args.num_single_layers, args.variant)
    weights = train_all_weights(controlnet, dtypes.compute)
    for model in (transformer, controlnet):
        use_shared_blocks(model)  # again after loading, because it depends on which weights are trained
    recompute_blocks(memory.recomputed_blocks(settings), controlnet, transformer)
    models = {"transformer": transformer, "controlnet": controlnet, "vae": vae}
    print(precision.parameter_table(models, dtypes))

    # ---- step and optimizer ----
    vae_config = configs.read_config(root, "vae")
    sigmas, places = loading.training_sigmas(root, data.sizes, args.timestep_shift)
    groups = [{"params": list(weights.values()), "lr": schedule.base, "weight_decay": args.adam_weight_decay}]
    optimizer = optimizers.create_optimizer(args.select(optimizers.Settings), groups)
    scaler = precision.loss_scaler(args.mixed_precision)
    step = TrainStepForFluxControlNet(
        controlnet,
        optimizer,
        scaler,
        args,
        transformer=transformer,
        vae=vae,
        vae_config=vae_config,
        sigmas=sigmas,
    )
    ema = averaging.EMA(list(weights.values()), args.ema_decay) if args.use_ema else None
    batches = Batches(args, stage, vae_config, data.sizes, sigmas.shape[1])

    # ---- resume ----
    state = optimizers.training_state(optimizer, scaler, ema=dict(zip(weights, ema.averages)) if ema else {})
    if run.checkpoint:  # the weights have a file of their own, which diffusers can load
        checkpoint.load_state(run.checkpoint / FOLDER / loading.WEIGHTS, weights)
    fixed = {**args.fixed(), "shift": flow.shift_kind(args.timestep_shift, data.sizes)}
    run.resume(fixed, component_fingerprint(root, "transformer", args.variant), state)

    # ---- train ----
    run.start(
        settings,
        schedule.length,
        trainable={"controlnet": sum(parameter.size for parameter in weights.values())},
        write_weights=lambda folder: loading.save_model(controlnet, folder / FOLDER, ms.float32),
    )
    sampler = ValidationSampler(args, rows, root, stage, models)
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
