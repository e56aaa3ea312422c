"""Control-LoRA for FLUX.1 on MindSpore: trains an adapter with which the transformer reads a condition image.

    python train_control_lora_flux.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev \\
        --dataset_name fusing/fill50k --conditioning_image_column conditioning_image --image_column image \\
        --caption_column text --output_dir out --mixed_precision bf16 --resolution 512 --train_batch_size 1 \\
        --cache_latents --lora_rank 64 --max_train_steps 5000

Writes out/pytorch_lora_weights.safetensors, checkpoints, samples/*.png, loss curves for TensorBoard, metrics.jsonl,
run.json and report.html. Ctrl-C saves a checkpoint; the same command with --resume_from_checkpoint latest continues the
run, bit for bit on the CPU. FLUX.1-Depth-dev and FLUX.1-Canny-dev are trained as they are, FLUX.1-Fill-dev with --fill.
"""

import mindspore as ms
import numpy as np
from mindspore import ops

from mindtune import files, flow
from mindtune.cli import UserError, print_lines, run_script
from mindtune.data import columns, fill_masks, order, pair_data
from mindtune.data.image_facts import ImageFacts
from mindtune.data.pairs import load_pairs
from mindtune.distributed import ranks
from mindtune.encode import windows
from mindtune.encode.cache import component_fingerprint
from mindtune.encode.encoder_stage import EncoderStage
from mindtune.flags import data_flags, image_flags, lora_flags, optimizer_flags, output_flags, training_flags
from mindtune.flags.parser import NO_EFFECT, Parser
from mindtune.models import (
    configs,
    control_lora,
    execution,
    initial_lora,
    loading,
    lora,
    lora_files,
    lora_settings,
    pipelines,
    precision,
    resolve,
    sampling,
)
from mindtune.models.gradient_checkpointing import recompute_blocks
from mindtune.models.train_step import TrainStep
from mindtune.optim import advice, averaging, optimizers, schedules
from mindtune.run import disk, memory, plan, record, validation, validation_rows

# ---- flags (yours to change) ---------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(__doc__)
    training_flags.model(parser, pipeline="FLUX.1")
    training_flags.initial_lora(parser)
    parser.add("fill", default=False, help="Train to fill masked parts of images: the conditions are masks.")
    data_flags.pairs(parser, without="with --fill of masks, or none")
    image_flags.images(parser, sample="pair", multiple=16, smallest=16)
    lora_flags.lora(parser, "flux_control")
    parser.add("train_norm_layers", default=False, help="Also train the norms of queries and keys.")
    training_flags.flux(parser, weighting_scheme="none")
    training_flags.loss(parser)
    training_flags.step(parser, sample="pair")
    optimizer_flags.optimizer(parser, learning_rate=1e-4, adam_weight_decay=1e-4)
    optimizer_flags.prodigy(parser)
    optimizer_flags.schedule(parser)
    optimizer_flags.ema(parser)
    output_flags.output(parser, output_dir="flux-control-lora")
    output_flags.upcast(parser)
    output_flags.condition_validation(parser, 28, image="condition image")
    output_flags.validation_mask(parser)
    output_flags.no_effect(parser, *NO_EFFECT)
    args = parser.parse_args(argv)
    if args.train_norm_layers and args.adapter == "lokr":
        raise UserError("--train_norm_layers: the files of --adapter lokr hold no norms. Leave one of the two out.")
    return args


# ---- checks (machinery) --------------------------------------------------------------------------


def find_pipeline(args):
    """Returns the directory of the pipeline, after checking it. Raises UserError."""
    name, revision, variant = args.pretrained_model_name_or_path, args.revision, args.variant
    options = {"weights": not args.dry_run, "hub": args.hub, "task": "fill" if args.fill else "control"}
    return resolve.pipeline(name, revision, variant, args.cache_dir, pipelines.FLUX_COMPONENTS, **options)


def find_adapters(args, root):
    """Returns the layers to adapt, the adapter to start from, and a hash of its file. Raises UserError."""
    initial, settings = args.select(initial_lora.Settings, system="flux_control"), args.select(lora_settings.Settings)
    layers, norms = {"transformer": control_lora.linear_layers(root, args.fill)}, control_lora.norm_shapes(root)
    found = initial_lora.find_adapters(initial, settings, layers, norms)
    control_lora.check_input_layer(root, args.fill, settings, *found[:2])
    return found


# ---- data (yours to change) ----------------------------------------------------------------------


class Batches:
    """Makes the inputs of the training step for a batch of pairs.

    images and conditions [B, 2C, h, w] (the VAE's mean and log-variance, from the cache) or [B, 3, H, W] (pixels in
    [-1, 1]); posterior noise and noise [B, C, h, w]; indices of timesteps [B]; prompt_embeds [B, L, D];
    pooled_prompt_embeds [B, P]; image ids [T, 3]. With --fill the conditions are the pixels of the masked images, and
    the masks follow, [B, pixels of a latent, h, w].
    """

    def __init__(self, args, stage, vae_config, sizes, num_train_timesteps):
        self.args = args
        self.stage = stage
        self.channels, self.factor = configs.latent_layout(vae_config)
        self.sizes = sizes
        self.num_train_timesteps = num_train_timesteps

    def make(self, uses):
        """The arrays of a batch, from its `PairUse`s, which all have the same size."""
        rows = order.stack([self.row(*use) for use in uses])
        return *rows[:7], flow.latent_image_ids(*self.latent_shape(uses[0].size)[1:]), *rows[7:]

    def latent_shape(self, size):
        """(C, h, w) of the latents of a crop of `size` (height, width) in pixels."""
        return self.channels, size[0] // self.factor, size[1] // self.factor

    def row(self, pair, size, draws, caption):
        """The inputs of the training step for one pair, for training and for the held-out loss alike."""
        args, shape, text = self.args, self.latent_shape(size), self.stage.text(caption)
        # The image and its condition are cropped and flipped alike.
        crops = {"crop": draws.crop(args.center_crop or args.cache_latents), "flip": draws.flip(args.random_flip)}
        index = self.sizes.index(size) * self.num_train_timesteps + draws.timestep(self.timestep)
        image, masks = self.stage.image(pair.image, size, cached=args.cache_latents, **crops), ()
        if args.fill:
            mask = fill_masks.fill_mask(pair, size, draws, **crops)
            pixels = self.stage.image(pair.image, size, cached=False, **crops) if args.cache_latents else image
            condition, masks = pixels * (1.0 - mask), (flow.mask_channels(mask, self.factor),)
        else:
            condition = self.stage.image(pair.condition, size, cached=args.cache_latents, **crops)
        return (
            image,
            condition,
            draws.normal("posterior", shape),
            draws.normal("noise", shape),
            np.int32(index),
            text["prompt_embeds"],
            text["pooled_prompt_embeds"],
            *masks,
        )

    def timestep(self, generator):
        """Draws the index of a timestep from the distribution of --weighting_scheme."""
        args = self.args
        u = flow.sample_density(generator, args.weighting_scheme, args.logit_mean, args.logit_std, args.mode_scale)
        return flow.density_to_index(u, self.num_train_timesteps)


# ---- the training step (yours to change) ---------------------------------------------------------


class TrainStepForFluxControl(TrainStep):
    """One micro-batch: loss, gradients and, every `gradient_accumulation_steps` calls, an update of the adapter.

    It draws no random numbers. `sigmas` [S, N] has the sigma of every timestep for each size. `vae` is None if all
    latents are cached; those of masked images are not. Returns (scaled loss, loss), scalars.
    """

    def __init__(self, transformer, optimizer, scaler, args, *, vae, vae_config, sigmas):
        super().__init__(
            transformer,
            optimizer,
            loss_scaler=scaler,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            max_grad_norm=args.max_grad_norm,
        )
        self.transformer = self.model
        self.encodes_images = not args.cache_latents
        self.vae = vae
        self.sigmas, self.deltas = flow.timestep_tables(sigmas, args.huber_schedule, args.huber_delta)
        self.compute_dtype = precision.resolve_precision(args.mixed_precision).compute
        # Read here, because a graph cannot read a dict such as a config.
        self.latent_shift, self.latent_scale = flow.scale_constants(vae_config)
        self.guidance_embeds = transformer.config["guidance_embeds"]
        self.text_ids = ms.Tensor(np.zeros((args.max_sequence_length, 3), np.float32))
        self.args = flow.AttrJitWrapper(
            weighting_scheme=args.weighting_scheme, loss=args.loss, guidance_scale=args.guidance_scale
        )

    def predict(
        self, images, conditions, posterior_noise, noise, indices, prompt_embeds, pooled, image_ids, masks=None
    ):
        """Returns the prediction in the compute dtype and its float32 target, [B, C, h, w], and sigmas [B, 1, 1, 1]."""
        if self.encodes_images:
            images = self.vae.encode(images.to(self.compute_dtype))[0]
        if self.vae is not None:
            conditions = self.vae.encode(conditions.to(self.compute_dtype))[0]
        latents = (flow.sample_posterior(images, posterior_noise) - self.latent_shift) * self.latent_scale
        sigmas = flow.get_sigmas(self.sigmas, indices)
        # The mean of the condition, as when images are generated.
        condition = (flow.posterior_mean(conditions) - self.latent_shift) * self.latent_scale
        inputs = [sigmas * noise + (1.0 - sigmas) * latents, condition]
        if masks is not None:
            inputs.append(masks)
        guidance = None
        if self.guidance_embeds:
            guidance = ops.full((1,), self.args.guidance_scale, dtype=ms.float32).broadcast_to((noise.shape[0],))
        prediction = self.transformer(
            hidden_states=ops.cat([flow.pack_latents(each).to(self.compute_dtype) for each in inputs], 2),
            timestep=sigmas.reshape((-1,)),  # FLUX takes t / 1000, which equals sigma
            guidance=guidance,
            pooled_projections=pooled.to(self.compute_dtype),
            encoder_hidden_states=prompt_embeds.to(self.compute_dtype),
            txt_ids=self.text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return flow.unpack_latents(prediction, noise.shape[2], noise.shape[3]), noise - latents, sigmas

    def forward(
        self, images, conditions, posterior_noise, noise, indices, prompt_embeds, pooled, image_ids, masks=None
    ):
        prediction, target, sigmas = self.predict(
            images, conditions, posterior_noise, noise, indices, prompt_embeds, pooled, image_ids, masks
        )
        weighting = flow.loss_weighting(self.args.weighting_scheme, sigmas)
        deltas = flow.get_sigmas(self.deltas, indices)
        loss = flow.sample_losses(prediction, target, weighting, self.args.loss, deltas).mean()
        return self.scale_loss(loss), loss


# ---- validation (yours to change) ----------------------------------------------------------------


class ValidationSampler:
    """Samples the images of `rows` from their conditions, from the same noise in every validation."""

    def __init__(self, args, rows, root, stage, models):
        self.args = args
        self.rows = rows
        self.root = root
        self.stage = stage
        self.transformer, self.vae = models["transformer"], models["vae"]
        self.scheduler_config = configs.read_config(root, "scheduler")
        self.dtypes = precision.resolve_precision(args.mixed_precision)

    def sample(self, final):  # the final validation has no other images
        """Returns the images of all rows."""
        vae = self.vae or loading.load_model(self.root, "vae", self.dtypes, self.args.variant)
        with execution.eval_mode(self.transformer):
            return {"Control-LoRA": [self.image(vae, row) for row in self.rows]}

    def image(self, vae, row):
        """Samples one image."""
        text, compute, inputs = self.stage.text(row.prompt), self.dtypes.compute, row.sampling()
        inputs["condition"] = sampling.encode_condition(vae, row.condition, row.mask_image, compute)
        return sampling.flux_image(self.transformer, vae, self.scheduler_config, text, compute, **inputs)


# ---- main (machinery) ----------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    source = args.select(columns.Source, condition_optional=args.fill)  # pairs without a mask get random ones

    # ---- check ----
    if args.dry_run:
        settings = args.select(memory.Settings, system="flux_control", root=find_pipeline(args))
        find_adapters(args, settings.root)
        print(plan.describe(settings))
        print(disk.describe(args.select(disk.Settings), settings, lambda: load_pairs(source)))
        return 0
    execution.set_up_device(graph_mode=args.mindspore_mode == 0)
    ranks.set_up(args.distributed)
    run = record.Run(args.select(record.Settings), args.recorded(), (lora_files.LORA_FILE,), args.defaults())
    files.require_writable("--cache_dir", args.cache_dir)
    root = find_pipeline(args)
    settings = args.select(memory.Settings, system="flux_control", root=root)
    plan.check_fit(settings)
    targets, initial, lora_digest = find_adapters(args, root)
    rows = validation_rows.read(args.select(validation_rows.Settings, system="flux_control", seed=run.seed))
    cache_dir = files.encoder_cache(args.cache_dir, run.output_dir)
    facts = ImageFacts(cache_dir, args.verify_data)
    pairs = args.select(pair_data.Settings)
    data = pair_data.load(source, pairs, run.seed, facts, encode_conditions=not args.fill)
    run.set_data(data)
    background = "white" if args.fill else data.background  # images to fill are put on that of training images
    rows = validation_rows.load_conditions(rows, args.resolution, 16, background)
    schedule = schedules.create(args.select(schedules.Settings), run.samples_per_update, run.max_train_steps)
    print_lines(advice.on_schedule(args.optimizer, schedule, run.max_train_steps, run.state))

    # ---- encode ----
    options = {"int8": args.base_precision == "int8", "verify": args.verify_data}
    options["interpolation"] = args.image_interpolation_mode
    stage = EncoderStage(root, args.variant, args.mixed_precision, cache_dir, args.max_sequence_length, **options)
    prompts, window = validation_rows.captions(rows), args.select(windows.Settings)
    encoded = windows.encode(stage, data, window, run.batch_range(), run.batches_per_update, prompts)

    # ---- load, freeze, cast ----
    ms.set_seed((run.seed + run.step + ranks.rank()) % 2**32)  # --lora_dropout alone draws on the device
    dtypes = precision.resolve_precision(args.mixed_precision)
    transformer = control_lora.load_transformer(root, args.fill, dtypes, args.variant, args.base_precision == "int8")
    needs_vae = args.fill or not args.cache_latents
    vae = loading.load_model(root, "vae", dtypes, args.variant) if needs_vae else None
    models = {"transformer": transformer, "vae": vae}
    precision.freeze_params(*models.values())

    # ---- add what is trained ----
    adapted = {"transformer": transformer}
    lora.add_adapters(adapted, args.select(lora_settings.Settings), targets, initial, dtypes.compute, run.seed)
    if args.train_norm_layers:
        lora.train_norms(transformer, initial.get("transformer", {}))
    recompute_blocks(memory.recomputed_blocks(settings), transformer)
    weights = lora.lora_parameters(transformer)
    print(precision.parameter_table(models, dtypes))

    # ---- step and optimizer ----
    vae_config = configs.read_config(root, "vae")
    sigmas, places = loading.training_sigmas(root, data.sizes, args.timestep_shift)
    rates, decays = {"transformer": schedule.base}, {"transformer": args.adam_weight_decay}
    scaled = schedule.base / args.learning_rate if args.learning_rate else 1.0  # --scale_lr
    groups = lora.parameter_groups(adapted, rates, decays, args.learning_rate_pattern, scaled)
    optimizer = optimizers.create_optimizer(args.select(optimizers.Settings), groups)
    scaler = precision.loss_scaler(args.mixed_precision)
    step = TrainStepForFluxControl(transformer, optimizer, scaler, args, vae=vae, vae_config=vae_config, sigmas=sigmas)
    ema = averaging.EMA(list(weights.values()), args.ema_decay) if args.use_ema else None
    batches = Batches(args, stage, vae_config, data.sizes, sigmas.shape[1])

    # ---- resume ----
    state = optimizers.training_state(optimizer, scaler, transformer=weights, ema=ema.by_name() if ema else {})
    fixed = {**args.fixed(), "lora_model": lora_digest, "shift": flow.shift_kind(args.timestep_shift, data.sizes)}
    run.resume(fixed, component_fingerprint(root, "transformer", args.variant), state)

    # ---- train ----
    run.start(
        settings,
        schedule.length,
        trainable={"transformer": sum(parameter.size for parameter in weights.values())},
        write_weights=lambda folder: lora.save_lora(folder / lora_files.LORA_FILE, adapted, ms.float32),
    )
    sampler = ValidationSampler(args, rows, root, stage, models)
    validate = validation.Validation(run, step, [transformer], batches.make, places, sampler, ema)
    if not run.checkpoint:
        validate()
    micro_batches = encoded.iterate(batches.make)
    while run.step < run.max_train_steps and not run.stopped():
        factor = schedule.factor(run.step)
        optimizers.set_learning_rates(optimizer, [group["lr"] * factor for group in groups])
        losses = []
        for inputs in ranks.micro_batches(step, micro_batches, args.gradient_accumulation_steps):
            losses.append(float(step(*inputs)[1]))  # the last of these calls updates the weights
        if ema:
            ema.update(run.step + 1)
        values = optimizers.logged_values(optimizer, scaler)
        run.update(losses, lr=schedule.base * factor, grad_norm=step.grad_clipper.norm, **values)
        if run.due(args.validation_steps):
            validate()
        if run.due(args.checkpointing_steps):
            run.save()  # after validation, because a run that is resumed from here does not repeat it

    # ---- finish ----
    run.save()
    if run.step < run.max_train_steps:
        return run.stop()
    dtype = ms.float32 if args.upcast_before_saving else dtypes.storage
    validate.write_result(lambda folder: lora.save_lora(folder / lora_files.LORA_FILE, adapted, dtype))
    return run.finish("adapter", run.output_dir / lora_files.LORA_FILE, validate(final=True))


if __name__ == "__main__":
    run_script(main)
