"""DreamBooth LoRA for FLUX.1 on MindSpore: trains a small adapter on a few images of a subject.

    python train_dreambooth_lora_flux.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev \\
        --instance_data_dir photos/ --instance_prompt "a photo of sks dog" --output_dir out \\
        --mixed_precision bf16 --resolution 512 --train_batch_size 1 --cache_latents --max_train_steps 500

Writes out/pytorch_lora_weights.safetensors, checkpoints, samples/*.png, loss curves for TensorBoard, metrics.jsonl,
run.json and report.html. Ctrl-C saves a checkpoint; the same command with --resume_from_checkpoint latest continues the
run, bit for bit on the CPU.
"""

import mindspore as ms
import numpy as np
from mindspore import ops

from mindtune import files, flow
from mindtune.cli import print_lines, run_script
from mindtune.data import buckets, captions, concepts, masks, order
from mindtune.data.image_data import ClassImages, ImageData
from mindtune.data.image_facts import ImageFacts
from mindtune.distributed import ranks
from mindtune.encode import class_images, windows
from mindtune.encode.cache import component_fingerprint
from mindtune.encode.encoder_stage import EncoderStage
from mindtune.encode.text_encoders import clip_pooled, token_ids
from mindtune.flags import data_flags, image_flags, lora_flags, optimizer_flags, output_flags, training_flags
from mindtune.flags.parser import Parser
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
from mindtune.models.tokenization import load_tokenizer
from mindtune.models.train_step import TrainStep
from mindtune.optim import advice, averaging, optimizers, schedules
from mindtune.run import disk, memory, plan, record, validation, validation_rows

# ---- flags (yours to change) ---------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add
    training_flags.model(parser, pipeline="FLUX.1")
    training_flags.initial_lora(parser)
    data_flags.instance_images(parser)
    image_flags.images(parser, sample="image", multiple=16, smallest=16)
    data_flags.prior_preservation(parser)
    lora_flags.lora(parser)
    training_flags.flux(parser, weighting_scheme="none")
    training_flags.loss(parser)
    training_flags.step(parser, sample="image")
    optimizer_flags.optimizer(parser, learning_rate=1e-4, adam_weight_decay=1e-4)
    add("text_encoder_lr", type=float, default=5e-6, minimum=0, help="Learning rate of the CLIP LoRA, unless prodigy.")
    add("adam_weight_decay_text_encoder", type=float, default=1e-3, help="Weight decay of the CLIP LoRA.")
    optimizer_flags.prodigy(parser)
    optimizer_flags.schedule(parser)
    optimizer_flags.ema(parser)
    output_flags.output(parser, output_dir="flux-dreambooth-lora")
    output_flags.upcast(parser)
    output_flags.validation(parser, num_inference_steps=28)
    add("validation_epochs", type=int, default=50, minimum=1, may_change=True, help="Epochs between validations.")
    output_flags.no_effect(
        parser, "allow_tf32", "enable_xformers_memory_efficient_attention", "enable_npu_flash_attention"
    )
    return parser.parse_args(argv)


# ---- checks (machinery) --------------------------------------------------------------------------


def find_pipeline(args):
    """Returns the directory of the pipeline, after checking it. Raises UserError."""
    return resolve.pipeline(
        args.pretrained_model_name_or_path,
        args.revision,
        args.variant,
        args.cache_dir,
        pipelines.FLUX_COMPONENTS,
        weights=not args.dry_run,
        hub=args.hub,
    )


def find_adapters(args, root):
    """Returns the layers to adapt, the adapters to start from, and a hash of their file. Raises UserError."""
    layers = {name: loading.linear_layers(root, name) for name in ("transformer", "text_encoder")}
    settings = args.select(initial_lora.Settings, system="flux_lora")
    return initial_lora.find_adapters(settings, args.select(lora_settings.Settings), layers)


# ---- data (yours to change) ----------------------------------------------------------------------


def find_concepts(args):
    """Returns the folders or data sets of --dataset_config, or the one that the other flags name. Raises UserError."""
    if args.dataset_config:
        return concepts.read(args.dataset_config, args.select(concepts.Concept))
    return [args.select(concepts.Concept, repeats=1)]  # ImageData has --repeats


def load_samples(args, min_size, facts):
    """Returns the usable instance images with their captions, after decoding those not in `facts`. Raises UserError."""
    threads, prior = args.dataloader_num_workers, args.with_prior_preservation
    return concepts.load(find_concepts(args), min_size, facts, args.skip_bad_images, threads, prior)


class Batches:
    """Makes the inputs of the training step for a batch. With prior preservation, class images are the second half.

    images [B, 2C, h, w] (the VAE's mean and log-variance, from the cache) or [B, 3, H, W] (pixels in [-1, 1]),
    posterior noise and noise [B, C, h, w], indices of timesteps [B], prompt_embeds [B, L, D], pooled_prompt_embeds
    [B, P] (with `tokenizer`, to train CLIP: token ids [B, 77]), and image ids [T, 3]. With --dataset_config or
    --masked_loss also the weights of the loss [B, 1, h, w].
    """

    def __init__(self, args, stage, vae_config, sizes, num_train_timesteps, tokenizer=None):
        self.args = args
        self.stage = stage
        self.channels, self.factor = configs.latent_layout(vae_config)
        self.sizes = sizes
        self.num_train_timesteps = num_train_timesteps
        self.tokenizer = tokenizer

    def make(self, uses):
        """The arrays of a batch, from its `ImageUse`s, which all have the same size."""
        image_ids = flow.latent_image_ids(*self.latent_shape(uses[0].size)[1:])
        rows = order.stack([self.row(*use) for use in uses])
        if not (self.args.dataset_config or self.args.masked_loss):
            return *rows, image_ids
        return *rows, image_ids, np.stack([self.loss_weights(use.sample, use.size, use.draws) for use in uses])

    def latent_shape(self, size):
        """(C, h, w) of the latents of a crop of `size` (height, width) in pixels."""
        return self.channels, size[0] // self.factor, size[1] // self.factor

    def row(self, sample, size, draws, caption):
        """The inputs of the training step for one image, for training and for the held-out loss alike."""
        args, shape = self.args, self.latent_shape(size)
        crop, flip = self.crop_and_flip(sample, draws)
        image = self.stage.image(sample, size, crop=crop, flip=flip, cached=args.cache_latents)
        text = self.stage.text(caption)
        pooled = text["pooled_prompt_embeds"]
        if self.tokenizer is not None:
            pooled = token_ids(self.tokenizer, caption, self.tokenizer.model_max_length).astype(np.int32)
        index = self.sizes.index(size) * self.num_train_timesteps + draws.timestep(self.timestep)
        return (
            image,
            draws.normal("posterior", shape),
            draws.normal("noise", shape),
            np.int32(index),
            text["prompt_embeds"],
            pooled,
        )

    def crop_and_flip(self, sample, draws):
        """The position of the crop, None for the center, and whether the image is flipped."""
        centered = self.args.cache_latents or sample.setting("center_crop", self.args.center_crop)
        return draws.crop(centered), draws.flip(sample.setting("random_flip", self.args.random_flip))

    def loss_weights(self, sample, size, draws):
        """The weights of the loss of an image at each latent, float32 [1, h, w]: that of its concept times its mask."""
        unmasked = sample.setting("unmasked_weight", self.args.unmasked_weight)
        crop, flip = self.crop_and_flip(sample, draws)
        weights = masks.loss_weights(sample, size, self.factor, unmasked, crop, flip)
        return weights * np.float32(sample.setting("weight", 1.0))

    def timestep(self, generator):
        """Draws the index of a timestep from the distribution of --weighting_scheme."""
        args = self.args
        u = flow.sample_density(generator, args.weighting_scheme, args.logit_mean, args.logit_std, args.mode_scale)
        return flow.density_to_index(u, self.num_train_timesteps)


# ---- the training step (yours to change) ---------------------------------------------------------


class TrainStepForFluxDevDB(TrainStep):
    """One micro-batch: loss, gradients and, every `gradient_accumulation_steps` calls, an update of the adapter.

    It draws no random numbers. `sigmas` [S, N] has the sigma of every timestep for each size. `vae` is None if the
    latents are cached, `text_encoder` is None unless CLIP is trained. Returns (scaled loss, loss), scalars.
    """

    def __init__(self, transformer, optimizer, scaler, args, *, vae, text_encoder, vae_config, sigmas):
        super().__init__(
            transformer,
            optimizer,
            loss_scaler=scaler,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            max_grad_norm=args.max_grad_norm,
        )
        self.transformer = self.model
        self.vae = vae
        self.text_encoder = text_encoder
        self.sigmas, self.deltas = flow.timestep_tables(sigmas, args.huber_schedule, args.huber_delta)
        self.compute_dtype = precision.resolve_precision(args.mixed_precision).compute
        # Read here, because a graph cannot read a dict such as a config.
        self.latent_shift, self.latent_scale = flow.scale_constants(vae_config)
        self.guidance_embeds = transformer.config["guidance_embeds"]
        self.text_ids = ms.Tensor(np.zeros((args.max_sequence_length, 3), np.float32))
        self.args = flow.AttrJitWrapper(
            weighting_scheme=args.weighting_scheme,
            loss=args.loss,
            with_prior_preservation=args.with_prior_preservation,
            prior_loss_weight=args.prior_loss_weight,
            guidance_scale=args.guidance_scale,
        )

    def predict(self, images, posterior_noise, noise, indices, prompt_embeds, pooled, image_ids, weights=None):
        """Returns the prediction in the compute dtype and its float32 target, [B, C, h, w], and sigmas [B, 1, 1, 1]."""
        if self.vae is not None:
            images = self.vae.encode(images.to(self.compute_dtype))[0]
        latents = (flow.sample_posterior(images, posterior_noise) - self.latent_shift) * self.latent_scale
        sigmas = flow.get_sigmas(self.sigmas, indices)
        noisy_latents = sigmas * noise + (1.0 - sigmas) * latents
        if self.text_encoder is not None:
            pooled = self.text_encoder(pooled)[1]
        guidance = None
        if self.guidance_embeds:
            guidance = ops.full((1,), self.args.guidance_scale, dtype=ms.float32).broadcast_to((noise.shape[0],))
        prediction = self.transformer(
            hidden_states=flow.pack_latents(noisy_latents).to(self.compute_dtype),
            timestep=sigmas.reshape((-1,)),  # FLUX takes t / 1000, which equals sigma
            guidance=guidance,
            pooled_projections=pooled.to(self.compute_dtype),
            encoder_hidden_states=prompt_embeds.to(self.compute_dtype),
            txt_ids=self.text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return flow.unpack_latents(prediction, noise.shape[2], noise.shape[3]), noise - latents, sigmas

    def forward(self, images, posterior_noise, noise, indices, prompt_embeds, pooled, image_ids, weights=None):
        prediction, target, sigmas = self.predict(
            images, posterior_noise, noise, indices, prompt_embeds, pooled, image_ids
        )
        weighting = flow.loss_weighting(self.args.weighting_scheme, sigmas)
        if weights is not None:
            weighting = weighting * weights
        deltas = flow.get_sigmas(self.deltas, indices)
        losses = flow.sample_losses(prediction, target, weighting, self.args.loss, deltas)
        if self.args.with_prior_preservation:
            loss = flow.prior_preservation_loss(losses, self.args.prior_loss_weight)
        else:
            loss = losses.mean()
        return self.scale_loss(loss), loss


# ---- validation (yours to change) ----------------------------------------------------------------


class ValidationSampler:
    """Samples the images of `rows`, from the same noise in every validation."""

    def __init__(self, args, rows, root, stage, models, tokenizer):
        self.args = args
        self.rows = rows
        self.root = root
        self.stage = stage
        self.models = models
        self.tokenizer = tokenizer
        self.scheduler_config = configs.read_config(root, "scheduler")
        self.dtypes = precision.resolve_precision(args.mixed_precision)

    def sample(self, final):
        """Returns the images of all rows with the adapter; with `final` before them those of the base model."""
        vae = self.models["vae"] or loading.load_model(self.root, "vae", self.dtypes, self.args.variant)
        adapted = [model for name, model in self.models.items() if name != "vae"]
        images = {}
        with execution.eval_mode(*adapted):
            for name in ("base", "adapter") if final else ("adapter",):  # the adapter last: training needs it
                for model in adapted:
                    lora.enable_lora(model, name == "adapter")
                images[name] = [self.image(vae, row) for row in self.rows]
        return images

    def image(self, vae, row):
        """Samples one image."""
        text, transformer, compute = self.stage.text(row.prompt), self.models["transformer"], self.dtypes.compute
        if "text_encoder" in self.models:
            pooled = clip_pooled(self.models["text_encoder"], self.tokenizer, row.prompt)
            text = {**text, "pooled_prompt_embeds": pooled}
        return sampling.flux_image(transformer, vae, self.scheduler_config, text, compute, **row.sampling())


# ---- main (machinery) ----------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)

    # ---- check ----
    if args.dry_run:
        settings = args.select(memory.Settings, system="flux_lora", root=find_pipeline(args))
        find_adapters(args, settings.root)
        print(
            plan.describe(settings),
            disk.describe(args.select(disk.Settings), settings, lambda: concepts.find_samples(find_concepts(args))),
            sep="\n",
        )
        return 0
    execution.set_up_device(graph_mode=args.mindspore_mode == 0)
    ranks.set_up(args.distributed)
    run = record.Run(args.select(record.Settings), args.recorded(), (lora_files.LORA_FILE,), args.defaults())
    files.require_writable("--cache_dir", args.cache_dir)
    files.require_writable("--class_data_dir", args.class_data_dir)
    root = find_pipeline(args)
    settings = args.select(memory.Settings, system="flux_lora", root=root)
    plan.check_fit(settings)
    targets, initial, lora_digest = find_adapters(args, root)
    rows = validation_rows.read(args.select(validation_rows.Settings, system="flux_lora", seed=run.seed))
    crops = args.select(buckets.Settings)
    cache_dir = files.encoder_cache(args.cache_dir, run.output_dir)
    facts = ImageFacts(cache_dir, args.verify_data)
    samples = load_samples(args, buckets.min_size(crops), facts)
    samples, bucket_ids, sizes = buckets.of_samples(samples, crops, args.train_batch_size)
    order.split(
        len(set(map(id, samples))), args.validation_split, run.seed
    )  # checks the flag before class images are generated

    # ---- encode ----
    stage = EncoderStage(
        root=root,
        variant=args.variant,
        precision=args.mixed_precision,
        cache_dir=cache_dir,
        max_sequence_length=args.max_sequence_length,
        interpolation=args.image_interpolation_mode,
        int8=args.base_precision == "int8",
        verify=args.verify_data,
    )
    prior_images = ClassImages([], np.array([], int))  # none without prior preservation
    if args.with_prior_preservation:
        class_settings = args.select(class_images.Settings)
        prior_images = class_images.of_samples(class_settings, stage, run.seed, sizes, samples, bucket_ids, facts)
    data = ImageData(
        samples,
        bucket_ids,
        prior_images,
        sizes=sizes,
        seed=run.seed,
        batch_size=args.train_batch_size,
        repeats=1 if args.dataset_config else args.repeats,
        validation_split=args.validation_split,
        caption_settings=args.select(captions.Settings),
    )
    run.set_data(data)
    schedule = schedules.create(args.select(schedules.Settings), run.samples_per_update, run.max_train_steps)
    print_lines(advice.on_schedule(args.optimizer, schedule, run.max_train_steps, run.state))
    prompts = validation_rows.captions(rows)
    encoded = windows.encode(
        stage, data, args.select(windows.Settings), run.batch_range(), run.batches_per_update, prompts
    )

    # ---- load, freeze, cast ----
    ms.set_seed((run.seed + run.step + ranks.rank()) % 2**32)  # --lora_dropout alone draws on the device
    dtypes = precision.resolve_precision(args.mixed_precision)
    transformer = loading.load_model(root, "transformer", dtypes, args.variant, args.base_precision == "int8")
    adapted = {"transformer": transformer}
    if args.train_text_encoder:
        adapted["text_encoder"] = loading.load_model(root, "text_encoder", dtypes, args.variant)
    tokenizer = load_tokenizer(root / "tokenizer") if args.train_text_encoder else None
    vae = None if args.cache_latents else loading.load_model(root, "vae", dtypes, args.variant)
    models = {**adapted, "vae": vae}
    precision.freeze_params(*models.values())

    # ---- add what is trained ----
    lora.add_adapters(adapted, args.select(lora_settings.Settings), targets, initial, dtypes.compute, run.seed)
    recompute_blocks(memory.recomputed_blocks(settings), *adapted.values())
    print(precision.parameter_table(models, dtypes))

    # ---- step and optimizer ----
    vae_config = configs.read_config(root, "vae")
    sigmas, places = loading.training_sigmas(root, sizes, args.timestep_shift)
    # prodigy has one step size for all groups: as in diffusers, CLIP then has the rate of the transformer.
    base_rates = {"transformer": schedule.base}
    base_rates["text_encoder"] = schedule.base if args.optimizer == "prodigy" else args.text_encoder_lr
    logged = {"lr": "transformer", **({"lr_text_encoder": "text_encoder"} if args.train_text_encoder else {})}
    decays = {"transformer": args.adam_weight_decay, "text_encoder": args.adam_weight_decay_text_encoder}
    scaled = schedule.base / args.learning_rate if args.learning_rate else 1.0  # --scale_lr
    groups = lora.parameter_groups(adapted, base_rates, decays, args.learning_rate_pattern, scaled)
    optimizer = optimizers.create_optimizer(args.select(optimizers.Settings), groups)
    scaler = precision.loss_scaler(args.mixed_precision)
    step = TrainStepForFluxDevDB(
        transformer,
        optimizer,
        scaler,
        args,
        vae=vae,
        text_encoder=adapted.get("text_encoder"),
        vae_config=vae_config,
        sigmas=sigmas,
    )
    weights = {name: lora.lora_parameters(model) for name, model in adapted.items()}
    ema = averaging.EMA([p for own in weights.values() for p in own.values()], args.ema_decay) if args.use_ema else None
    batches = Batches(args, stage, vae_config, sizes, sigmas.shape[1], tokenizer)

    # ---- resume ----
    state = optimizers.training_state(optimizer, scaler, **weights, ema=ema.by_name() if ema else {})
    fixed = {**args.fixed(), "lora_model": lora_digest, "dataset_config": concepts.digest(args.dataset_config)}
    fixed["shift"] = flow.shift_kind(args.timestep_shift, sizes)
    run.resume(fixed, component_fingerprint(root, "transformer", args.variant), state)

    # ---- train ----
    run.start(
        settings,
        schedule.length,
        trainable={name: sum(p.size for p in model.trainable_params()) for name, model in adapted.items()},
        write_weights=lambda folder: lora.save_lora(folder / lora_files.LORA_FILE, adapted, ms.float32),
    )
    sampler = ValidationSampler(args, validation_rows.with_size(rows, sizes[0]), root, stage, models, tokenizer)
    validate = validation.Validation(run, step, list(adapted.values()), batches.make, places, sampler, ema)
    if not run.checkpoint:
        validate()
    micro_batches = encoded.iterate(batches.make)
    while run.step < run.max_train_steps and not run.stopped():
        rates = [group["lr"] * schedule.factor(run.step) for group in groups]
        optimizers.set_learning_rates(optimizer, rates)
        losses = []
        for inputs in ranks.micro_batches(step, micro_batches, args.gradient_accumulation_steps):
            losses.append(float(step(*inputs)[1]))  # the last of these calls updates the weights
        if ema:
            ema.update(run.step + 1)
        values = {name: base_rates[model] * schedule.factor(run.step) for name, model in logged.items()}
        values.update(optimizers.logged_values(optimizer, scaler))
        run.update(losses, grad_norm=step.grad_clipper.norm, **values)
        if run.due(args.validation_epochs * data.epoch_length / run.samples_per_update):
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
