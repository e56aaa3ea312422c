"""LoRA for FLUX.1-Kontext on MindSpore: trains an adapter that edits images as an instruction says.

    python train_lora_flux_kontext.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-Kontext-dev \\
        --train_data_dir pairs/ --image_column target --conditioning_image_column source --caption_column instruction \\
        --output_dir out --mixed_precision bf16 --resolution 512 --train_batch_size 1 --cache_latents \\
        --max_train_steps 1000

Writes out/pytorch_lora_weights.safetensors, checkpoints, samples/*.png, loss curves for TensorBoard, metrics.jsonl,
run.json and report.html. Ctrl-C saves a checkpoint; the same command with --resume_from_checkpoint latest continues the
run, bit for bit on the CPU. A pair without a source trains text-to-image.
"""

import mindspore as ms
import numpy as np
from mindspore import ops

from mindtune import files, flow
from mindtune.cli import print_lines, run_script
from mindtune.data import columns, order, pair_data
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
    training_flags.model(parser, pipeline="FLUX.1-Kontext")
    training_flags.initial_lora(parser)
    data_flags.pairs(parser, "sources", "a pair without one trains text-to-image", aliases=("cond_image_column",))
    image_flags.images(parser, sample="pair", multiple=16, smallest=16)
    lora_flags.lora(parser, "flux_kontext")
    training_flags.flux(parser, weighting_scheme="none")
    training_flags.loss(parser)
    training_flags.step(parser, sample="pair")
    optimizer_flags.optimizer(parser, learning_rate=1e-4, adam_weight_decay=1e-4)
    optimizer_flags.prodigy(parser)
    optimizer_flags.schedule(parser)
    optimizer_flags.ema(parser)
    output_flags.output(parser, output_dir="flux-kontext-lora")
    output_flags.upcast(parser)
    output_flags.condition_validation(parser, 28, image="image to edit")
    output_flags.no_effect(parser, *NO_EFFECT)
    return parser.parse_args(argv)


# ---- checks (machinery) --------------------------------------------------------------------------


def find_pipeline(args):
    """Returns the directory of the pipeline, after checking it. Raises UserError."""
    name, revision, variant = args.pretrained_model_name_or_path, args.revision, args.variant
    options = {"weights": not args.dry_run, "hub": args.hub, "task": "kontext"}
    return resolve.pipeline(name, revision, variant, args.cache_dir, pipelines.FLUX_COMPONENTS, **options)


def find_adapters(args, root):
    """Returns the layers to adapt, the adapter to start from, and a hash of its file. Raises UserError."""
    settings = args.select(initial_lora.Settings, system="flux_kontext")
    layers = {"transformer": loading.linear_layers(root, "transformer")}
    return initial_lora.find_adapters(settings, args.select(lora_settings.Settings), layers)


# ---- data (yours to change) ----------------------------------------------------------------------


class Batches:
    """Makes the inputs of the training step for a batch of pairs.

    images [B, 2C, h, w] (the VAE's mean and log-variance, from the cache) or [B, 3, H, W] (pixels in [-1, 1]);
    posterior noise and noise [B, C, h, w]; indices of timesteps [B]; prompt_embeds [B, L, D]; pooled_prompt_embeds
    [B, P]; image ids [T + S, 3]; and, if the pairs have them, sources like images, in a size of their own.
    """

    def __init__(self, args, stage, data, vae_config, num_train_timesteps):
        self.args = args
        self.stage = stage
        self.data = data
        self.channels, self.factor = configs.latent_layout(vae_config)
        self.num_train_timesteps = num_train_timesteps

    def make(self, uses):
        """The arrays of a batch, from its `PairUse`s, whose images and sources all have the same sizes."""
        ids = flow.latent_image_ids(*self.latent_shape(uses[0].size)[1:])
        source_size = self.data.condition_size(uses[0].sample, uses[0].size)
        if source_size:
            ids = np.concatenate([ids, flow.source_image_ids(*self.latent_shape(source_size)[1:])])
        rows = order.stack([self.row(*use) for use in uses])
        return *rows[:6], ids, *rows[6:]

    def latent_shape(self, size):
        """(C, h, w) of the latents of a crop of `size` (height, width) in pixels."""
        return self.channels, size[0] // self.factor, size[1] // self.factor

    def row(self, pair, size, draws, caption):
        """The inputs of the training step for one pair, for training and for the held-out loss alike."""
        args, shape, text = self.args, self.latent_shape(size), self.stage.text(caption)
        crop, flip = draws.crop(args.center_crop), draws.flip(args.random_flip)
        index = self.data.sizes.index(size) * self.num_train_timesteps + draws.timestep(self.timestep)
        row = (
            self.stage.image(pair.image, size, crop=crop, flip=flip, cached=args.cache_latents),
            draws.normal("posterior", shape),
            draws.normal("noise", shape),
            np.int32(index),
            text["prompt_embeds"],
            text["pooled_prompt_embeds"],
        )
        source_size = self.data.condition_size(pair, size)
        if source_size is None:
            return row
        crop = self.data.condition_position(pair, crop)
        return *row, self.stage.image(pair.condition, source_size, crop=crop, flip=flip, cached=args.cache_latents)

    def timestep(self, generator):
        """Draws the index of a timestep from the distribution of --weighting_scheme."""
        args = self.args
        u = flow.sample_density(generator, args.weighting_scheme, args.logit_mean, args.logit_std, args.mode_scale)
        return flow.density_to_index(u, self.num_train_timesteps)


# ---- the training step (yours to change) ---------------------------------------------------------


class TrainStepForFluxKontext(TrainStep):
    """One micro-batch: loss, gradients and, every `gradient_accumulation_steps` calls, an update of the adapter.

    It draws no random numbers. `sigmas` [S, N] has the sigma of every timestep for each size. `vae` is None if the
    latents are cached. Returns (scaled loss, loss), scalars.
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

    def moments(self, images):
        """The VAE's mean and log-variance [B, 2C, h, w] of pixels; these themselves if the latents are cached."""
        return images if self.vae is None else self.vae.encode(images.to(self.compute_dtype))[0]

    def predict(self, images, posterior_noise, noise, indices, prompt_embeds, pooled, image_ids, sources=None):
        """Returns the prediction in the compute dtype and its float32 target, [B, C, h, w], and sigmas [B, 1, 1, 1]."""
        latents = flow.sample_posterior(self.moments(images), posterior_noise)
        latents = (latents - self.latent_shift) * self.latent_scale
        sigmas = flow.get_sigmas(self.sigmas, indices)
        tokens = flow.pack_latents(sigmas * noise + (1.0 - sigmas) * latents).to(self.compute_dtype)
        count = tokens.shape[1]
        if sources is not None:  # its mean, as when images are edited
            source = (flow.posterior_mean(self.moments(sources)) - self.latent_shift) * self.latent_scale
            tokens = ops.cat((tokens, flow.pack_latents(source).to(self.compute_dtype)), 1)
        guidance = None
        if self.guidance_embeds:
            guidance = ops.full((1,), self.args.guidance_scale, dtype=ms.float32).broadcast_to((noise.shape[0],))
        prediction = self.transformer(
            hidden_states=tokens,
            timestep=sigmas.reshape((-1,)),  # FLUX takes t / 1000, which equals sigma
            guidance=guidance,
            pooled_projections=pooled.to(self.compute_dtype),
            encoder_hidden_states=prompt_embeds.to(self.compute_dtype),
            txt_ids=self.text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        if sources is not None:
            prediction = prediction[:, :count]  # the tokens of the target
        return flow.unpack_latents(prediction, noise.shape[2], noise.shape[3]), noise - latents, sigmas

    def forward(self, images, posterior_noise, noise, indices, prompt_embeds, pooled, image_ids, sources=None):
        prediction, target, sigmas = self.predict(
            images, posterior_noise, noise, indices, prompt_embeds, pooled, image_ids, sources
        )
        weighting = flow.loss_weighting(self.args.weighting_scheme, sigmas)
        deltas = flow.get_sigmas(self.deltas, indices)
        loss = flow.sample_losses(prediction, target, weighting, self.args.loss, deltas).mean()
        return self.scale_loss(loss), loss


# ---- validation (yours to change) ----------------------------------------------------------------


class ValidationSampler:
    """Samples the images of `rows`, edits or images of a prompt alone, from the same noise in every validation."""

    def __init__(self, args, rows, root, stage, models):
        self.args = args
        self.rows = rows
        self.root = root
        self.stage = stage
        self.transformer, self.vae = models["transformer"], models["vae"]
        self.scheduler_config = configs.read_config(root, "scheduler")
        self.dtypes = precision.resolve_precision(args.mixed_precision)

    def sample(self, final):
        """Returns the images of all rows with the adapter; with `final` before them those of the base model."""
        vae = self.vae or loading.load_model(self.root, "vae", self.dtypes, self.args.variant)
        images = {}
        with execution.eval_mode(self.transformer):
            for name in ("base", "adapter") if final else ("adapter",):  # the adapter last: training needs it
                lora.enable_lora(self.transformer, name == "adapter")
                images[name] = [self.image(vae, row) for row in self.rows]
        return images

    def image(self, vae, row):
        """Samples one image: edits that of the row, or draws one from the prompt alone."""
        text, compute, inputs = self.stage.text(row.prompt), self.dtypes.compute, row.sampling()
        if row.condition:
            inputs["source"] = sampling.encode_image(vae, row.condition, compute)
        return sampling.flux_image(self.transformer, vae, self.scheduler_config, text, compute, **inputs)


# ---- main (machinery) ----------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    source = args.select(columns.Source, condition_optional=True)

    # ---- check ----
    if args.dry_run:
        settings = args.select(memory.Settings, system="flux_kontext", root=find_pipeline(args))
        find_adapters(args, settings.root)
        print(plan.describe(settings))
        print(disk.describe(args.select(disk.Settings), settings, lambda: load_pairs(source)))
        return 0
    execution.set_up_device(graph_mode=args.mindspore_mode == 0)
    ranks.set_up(args.distributed)
    run = record.Run(args.select(record.Settings), args.recorded(), (lora_files.LORA_FILE,), args.defaults())
    files.require_writable("--cache_dir", args.cache_dir)
    root = find_pipeline(args)
    settings = args.select(memory.Settings, system="flux_kontext", root=root)
    plan.check_fit(settings)
    targets, initial, lora_digest = find_adapters(args, root)
    rows = validation_rows.read(args.select(validation_rows.Settings, system="flux_kontext", seed=run.seed))
    cache_dir = files.encoder_cache(args.cache_dir, run.output_dir)
    facts = ImageFacts(cache_dir, args.verify_data)
    pairs = args.select(pair_data.Settings, own_condition_size=True)
    data = pair_data.load(source, pairs, run.seed, facts, encode_conditions=True)
    run.set_data(data)
    rows = validation_rows.load_conditions(rows, args.resolution, 16, data.background)
    rows = validation_rows.with_size(rows, data.sizes[0])
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
    transformer = loading.load_model(root, "transformer", dtypes, args.variant, args.base_precision == "int8")
    vae = None if args.cache_latents else loading.load_model(root, "vae", dtypes, args.variant)
    models = {"transformer": transformer, "vae": vae}
    precision.freeze_params(*models.values())

    # ---- add what is trained ----
    adapted = {"transformer": transformer}
    lora.add_adapters(adapted, args.select(lora_settings.Settings), targets, initial, dtypes.compute, run.seed)
    recompute_blocks(memory.recomputed_blocks(settings), transformer)
    weights = lora.lora_parameters(transformer)
    print(precision.parameter_table(models, dtypes))

    # ---- step and optimizer ----
    vae_config = configs.read_config(root, "vae")
    sigmas, places = loading.training_sigmas(root, data.sizes, args.timestep_shift)  # of the targets
    rates, decays = {"transformer": schedule.base}, {"transformer": args.adam_weight_decay}
    scaled = schedule.base / args.learning_rate if args.learning_rate else 1.0  # --scale_lr
    groups = lora.parameter_groups(adapted, rates, decays, args.learning_rate_pattern, scaled)
    optimizer = optimizers.create_optimizer(args.select(optimizers.Settings), groups)
    scaler = precision.loss_scaler(args.mixed_precision)
    step = TrainStepForFluxKontext(transformer, optimizer, scaler, args, vae=vae, vae_config=vae_config, sigmas=sigmas)
    ema = averaging.EMA(list(weights.values()), args.ema_decay) if args.use_ema else None
    batches = Batches(args, stage, data, vae_config, sigmas.shape[1])

    # ---- resume ----
    state = optimizers.training_state(optimizer, scaler, transformer=weights, ema=ema.by_name() if ema else {})
    fixed = {**args.fixed(), "lora_model": lora_digest, "shift": flow.shift_kind(args.timestep_shift, data.sizes)}
    run.resume(fixed, component_fingerprint(root, "transformer", args.variant), state)

    # ---- train ----
    sampler = ValidationSampler(args, rows, root, stage, models)
    run.start(
        settings,
        schedule.length,
        trainable={"transformer": sum(parameter.size for parameter in weights.values())},
        write_weights=lambda folder: lora.save_lora(folder / lora_files.LORA_FILE, adapted, ms.float32),
    )
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
