"""The step of a Control-LoRA: its loss against NumPy and plain model calls, both modes, and what an update changes.

Batches: crops of conditions and masks.
"""

import mindone.diffusers
import mindspore as ms
import numpy as np
import pytest
from flux_pairs import (
    SCALE,
    SHIFT,
    SIGMAS,
    Encoder,
    assert_modes_agree,
    latents_of,
    numpy_moments,
    packed,
    unpacked,
    updates_in_modes,
)
from mindspore import nn

from mindtune import flow, rng
from mindtune.models import control_lora, lora, lora_settings, named_parameters, precision, replaced_layers
from mindtune.optim import adamw

from .conftest import half_mask

CONFIG = {"scaling_factor": SCALE, "shift_factor": SHIFT}
HEIGHT, WIDTH = 4, 6  # of the latents


class ChannelFlux(nn.Cell):
    """Stands in for the transformer with a formula that NumPy can repeat.

    A token is the trained gain times its noisy values, 0.3 times those of the condition, a weighted mean of those of
    the mask, and its place.
    """

    def __init__(self, guidance=True):
        super().__init__()
        self.gain = ms.Parameter(ms.Tensor(0.5, ms.float32), name="gain")
        self.weights = ms.Tensor(np.linspace(-1, 1, 256), ms.float32)
        self.config = {"guidance_embeds": guidance}

    def construct(self, hidden_states, timestep, guidance, pooled_projections, encoder_hidden_states, txt_ids, img_ids,
                  return_dict):  # fmt: skip
        number = timestep + encoder_hidden_states.mean(axis=(1, 2)) - pooled_projections.mean(axis=1)
        number = number if guidance is None else number + 0.01 * guidance
        place = (7.0 * img_ids[:, 0] + 0.1 * img_ids[:, 1] - 0.2 * img_ids[:, 2]).reshape((1, -1, 1))
        found = self.gain * hidden_states[:, :, :64] + 0.3 * hidden_states[:, :, 64:128]
        if hidden_states.shape[2] > 128:
            found = found + (hidden_states[:, :, 128:] * self.weights).mean(axis=2, keep_dims=True)
        return (found + number.reshape((-1, 1, 1)) + place,)


def make_step(script, flags, transformer, *more, optimizer=None, vae=None):
    args = script.parse_args(flags("unused", "--max_sequence_length", 5, *more))
    if optimizer is None:
        optimizer = adamw.AdamW([{"params": transformer.trainable_params(), "lr": 1e-2, "weight_decay": 0.0}])
    models = {"vae": vae, "vae_config": CONFIG, "sigmas": SIGMAS}
    return script.TrainStepForFluxControl(transformer, optimizer, precision.loss_scaler("no"), args, **models)


def make_batch(size, masks=False):
    """Not square, another index for every image, a log-variance that matters; with `masks` pixels of masked images."""
    moments, posterior, noise = (
        rng.normal(1, name, shape=(size, count, HEIGHT, WIDTH))
        for name, count in (("moments", 32), ("posterior", 16), ("noise", 16))
    )
    conditions = rng.normal(1, "condition", shape=(size, 32, HEIGHT, WIDTH))
    indices = np.array([100, 900, 500][:size], np.int32)
    text, pooled = rng.normal(1, "text", shape=(size, 5, 32)), rng.normal(1, "pooled", shape=(size, 32))
    batch = [moments, conditions, posterior, noise, indices, text, pooled, flow.latent_image_ids(HEIGHT, WIDTH)]
    if masks:
        batch[1] = rng.normal(1, "masked pixels", shape=(size, 3, 8 * HEIGHT, 8 * WIDTH))
        mask = (rng.normal(1, "mask", shape=(size, 1, 8 * HEIGHT, 8 * WIDTH)) > 0).astype(np.float32)
        batch.append(np.stack([flow.mask_channels(each, 8) for each in mask]))
        return batch, mask
    return batch


def noisy_parts(batch):
    """(noisy latents, latents, noise, sigmas [B, 1, 1, 1], condition's latents) in float64; moments of the latter."""
    moments, conditions, posterior, noise, indices = (np.asarray(part, np.float64) for part in batch[:5])
    latents = latents_of(moments, posterior)
    sigma = SIGMAS[0][indices.astype(int)].astype(np.float64).reshape(-1, 1, 1, 1)
    conditions = numpy_moments(conditions) if conditions.shape[1] == 3 else conditions
    return sigma * noise + (1 - sigma) * latents, latents, noise, sigma, latents_of(conditions, 0.0)


def mask_tokens(mask):
    """What FluxFillPipeline gives the model of masks [B, 1, H, W]: float64 [B, H/16 * W/16, 256].

    Pixel by pixel: the 8x8 pixels of a latent are its channels, and the four latents of a token are packed like others.
    """
    batch, _, height, width = mask.shape
    tokens = np.empty((batch, height // 16, width // 16, 64, 2, 2))
    for y, x in np.ndindex(height, width):
        tokens[:, y // 16, x // 16, y % 8 * 8 + x % 8, y // 8 % 2, x // 8 % 2] = mask[:, 0, y, x]
    return tokens.reshape(batch, -1, 256)


def numpy_loss(batch, scheme="none", gain=0.5, guidance=3.5, mask=None):
    """The loss of `ChannelFlux` in float64."""
    noisy, latents, noise, sigma, condition = noisy_parts(batch)
    text, pooled = (np.asarray(part, np.float64) for part in batch[5:7])
    number = sigma.ravel() + text.mean(axis=(1, 2)) - pooled.mean(axis=1) + 0.01 * guidance
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH] // 2
    prediction = gain * noisy + 0.3 * condition + number.reshape(-1, 1, 1, 1) + 0.1 * rows - 0.2 * columns
    if mask is not None:
        means = (mask_tokens(mask) * np.linspace(-1, 1, 256)).mean(axis=2).reshape(-1, 1, HEIGHT // 2, WIDTH // 2)
        prediction = prediction + means.repeat(2, axis=2).repeat(2, axis=3)
    weight = {"sigma_sqrt": sigma**-2, "cosmap": 2 / (np.pi * (1 - 2 * sigma + 2 * sigma**2))}.get(scheme, 1.0)
    return np.mean(weight * (prediction - (noise - latents)) ** 2)


@pytest.mark.parametrize("scheme", ["none", "cosmap"])
def test_the_loss_is_the_formulas(control_lora_script, control_lora_flags, mode, scheme):
    """The condition's values follow the noisy ones in a token; of the condition the mean: no noise of its own."""
    more = ["--cache_latents", "--weighting_scheme", scheme]
    step, batch = make_step(control_lora_script, control_lora_flags, ChannelFlux(), *more), make_batch(3)
    assert float(step(*map(ms.Tensor, batch))[1]) == pytest.approx(numpy_loss(batch, scheme), rel=1e-5)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "pixels"])
def test_the_loss_of_a_fill_model_is_the_formulas(control_lora_script, control_lora_flags, mode, cached):
    """Masked images are encoded in the step even if latents are cached; the pixels of the mask follow them."""
    more = ["--fill", *(["--cache_latents"] if cached else [])]
    batch, mask = make_batch(2, masks=True)
    if not cached:
        batch[0] = rng.normal(0, "pixels", shape=(2, 3, 8 * HEIGHT, 8 * WIDTH))
    step = make_step(control_lora_script, control_lora_flags, ChannelFlux(), *more, vae=Encoder())
    found = float(step(*map(ms.Tensor, batch))[1])
    if not cached:
        batch[0] = numpy_moments(batch[0])
    assert found == pytest.approx(numpy_loss(batch, mask=mask), rel=1e-5)


def test_pixels_of_image_and_condition_are_encoded_in_the_step(control_lora_script, control_lora_flags):
    step = make_step(control_lora_script, control_lora_flags, ChannelFlux(False), vae=Encoder())
    batch = make_batch(2)
    batch[:2] = (rng.normal(0, name, shape=(2, 3, 8 * HEIGHT, 8 * WIDTH)) for name in "ab")
    found = float(step(*map(ms.Tensor, batch))[1])
    batch[:2] = map(numpy_moments, batch[:2])
    assert found == pytest.approx(numpy_loss(batch, guidance=0), rel=1e-5)


def test_gradient_is_the_losss_derivative(control_lora_script, control_lora_flags, mode):
    """One plain gradient-descent step moves the number by -lr dL/dgain, clipped to norm 1."""
    transformer, batch = ChannelFlux(), make_batch(2)
    optimizer = nn.SGD(transformer.trainable_params(), 0.1)
    step = make_step(control_lora_script, control_lora_flags, transformer, "--cache_latents", optimizer=optimizer)
    step(*map(ms.Tensor, batch))
    slope = (numpy_loss(batch, gain=0.5 + 1e-4) - numpy_loss(batch, gain=0.5 - 1e-4)) / 2e-4
    assert float(step.grad_clipper.norm) == pytest.approx(abs(slope), rel=1e-4)
    assert float(transformer.gain) == pytest.approx(0.5 - 0.1 * np.clip(slope, -1, 1), rel=1e-5)


# ---- the real transformer ------------------------------------------------------------------------


def lora_step(script, flags, root, kind="no", int8=False, adapter="lora", fill=False, trained=True):
    """A step on the small pipeline's widened transformer. `trained`: B is not zero, and norms are not one."""
    dtypes = precision.resolve_precision(kind)
    transformer = control_lora.load_transformer(root, fill, dtypes, int8=int8)
    precision.freeze_params(transformer)
    settings, targets = lora_settings.Settings(adapter, lora_rank=4), {"transformer": [lora_settings.ALL_LINEAR]}
    lora.add_adapters({"transformer": transformer}, settings, targets, {}, dtypes.compute, seed=0)
    if adapter != "lokr":
        lora.train_norms(transformer, {})
    for name, parameter in lora.lora_parameters(transformer).items() if trained else ():
        if ".lora_A." not in name:
            value = 0.1 * rng.normal(0, name, shape=parameter.shape) + (1.0 if ".norm_" in name else 0.0)
            parameter.set_data(ms.Tensor(value, ms.float32))
    more = ["--mixed_precision", kind, *(["--base_precision", "int8"] if int8 else []), *(["--fill"] if fill else [])]
    vae = Encoder() if fill else None
    return make_step(script, flags, transformer, "--cache_latents", *more, vae=vae), transformer


@pytest.fixture(scope="module")
def two_updates(control_lora_script, control_lora_flags, small_flux):
    """`updates_in_modes`; norms train too."""
    return updates_in_modes(lambda: lora_step(control_lora_script, control_lora_flags, small_flux), make_batch(2))


def test_graph_equals_pynative(two_updates):
    weights = assert_modes_agree(two_updates)
    assert sum(".norm_" in name for name in weights) == 6


@pytest.mark.parametrize("fill", [False, True], ids=["condition", "fill"])
def test_the_loss_is_that_of_mindones_model_called_plainly(control_lora_script, control_lora_flags, small_flux, fill):
    """mindone's class with more inputs, without our operators, on tokens that were packed by hand."""
    batch, mask = make_batch(2, masks=True) if fill else (make_batch(2), None)
    noisy, latents, noise, sigma, condition = noisy_parts(batch)
    step, transformer = lora_step(control_lora_script, control_lora_flags, small_flux, fill=fill, trained=False)
    config = {**transformer.config, "in_channels": 384 if fill else 128, "out_channels": 64}
    plain = mindone.diffusers.FluxTransformer2DModel(**{k: v for k, v in config.items() if not k.startswith("_")})
    values = named_parameters.model_parameters(transformer)
    for name, parameter in named_parameters.model_parameters(plain).items():
        own = next(value for key, value in values.items() if key.replace(".base_layer", "") == name)
        parameter.set_data(ms.Tensor(own.asnumpy()))
    generator = np.random.default_rng(0)  # weights of further inputs that are not zero, in both
    wide = generator.standard_normal(plain.x_embedder.weight.shape).astype(np.float32)
    plain.x_embedder.weight.set_data(ms.Tensor(wide))
    values["x_embedder.base_layer.weight"].set_data(ms.Tensor(wide))
    plain.time_text_embed.time_proj = replaced_layers.Timesteps(plain.time_text_embed.time_proj)
    inputs = [packed(noisy), packed(condition), *([mask_tokens(mask)] if fill else [])]
    tokens = plain(
        hidden_states=ms.Tensor(np.concatenate(inputs, axis=2).astype(np.float32)),
        timestep=ms.Tensor(sigma.ravel().astype(np.float32)),
        guidance=ms.Tensor([3.5, 3.5], ms.float32),
        pooled_projections=ms.Tensor(batch[6]),
        encoder_hidden_states=ms.Tensor(batch[5]),
        txt_ids=ms.Tensor(np.zeros((5, 3), np.float32)),
        img_ids=ms.Tensor(batch[7]),
        return_dict=False,
    )[0].asnumpy()
    expected = np.mean((unpacked(tokens.astype(np.float64), HEIGHT, WIDTH) - (noise - latents)) ** 2)
    assert float(step(*map(ms.Tensor, batch))[1]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "kind, int8, adapter, fill",
    [("no", False, "lora", True), ("no", False, "dora", False), ("bf16", False, "lora", False),
     ("no", True, "lora", False), ("no", False, "lokr", False)],
    ids=["fill", "DoRA", "bf16", "int8", "LoKr"],
)  # fmt: skip
def test_the_first_prediction_is_the_base_models(
    control_lora_script, control_lora_flags, small_flux, kind, int8, adapter, fill
):
    """Whatever the condition; as soon as the adapter is not zero, the condition shows."""
    step, _ = lora_step(control_lora_script, control_lora_flags, small_flux, kind, int8, adapter, fill, False)
    batch = make_batch(2, masks=True)[0] if fill else make_batch(2)
    other = [*batch]
    other[1] = batch[1][::-1].copy()
    first, second = (step.predict(*map(ms.Tensor, each))[0].to(ms.float32).asnumpy() for each in (batch, other))
    np.testing.assert_array_equal(first, second)

    compute = precision.resolve_precision(kind).compute
    base = control_lora.loading.load_model(small_flux, "transformer", precision.resolve_precision(kind), int8=int8)
    noisy, *_ = noisy_parts(batch)
    tokens = base(
        hidden_states=flow.pack_latents(ms.Tensor(noisy, ms.float32)).to(compute),
        timestep=ms.Tensor(SIGMAS[0][batch[4]]),
        guidance=ms.Tensor([3.5, 3.5], ms.float32),
        pooled_projections=ms.Tensor(batch[6]).to(compute),
        encoder_hidden_states=ms.Tensor(batch[5]).to(compute),
        txt_ids=ms.Tensor(np.zeros((5, 3), np.float32)),
        img_ids=ms.Tensor(batch[7]),
        return_dict=False,
    )[0]
    expected = flow.unpack_latents(tokens, HEIGHT, WIDTH).to(ms.float32).asnumpy()
    np.testing.assert_allclose(first, expected, atol=(1e-5 if kind == "no" else 2e-2) * np.abs(expected).max())

    step(*map(ms.Tensor, batch))
    step(*map(ms.Tensor, batch))
    first, second = (step.predict(*map(ms.Tensor, each))[0].to(ms.float32).asnumpy() for each in (batch, other))
    assert np.abs(first - second).max() > 1e-4


@pytest.mark.parametrize("kind, int8", [("no", True), ("fp16", False), ("bf16", False)], ids=["int8", "fp16", "bf16"])
def test_frozen_parameters_keep_their_bits_and_every_trainable_moves(
    control_lora_script, control_lora_flags, small_flux, two_updates, kind, int8
):
    """Norms train in float32; linear layers and biases stay as they are, the widened one too."""
    step, transformer = lora_step(control_lora_script, control_lora_flags, small_flux, kind, int8)
    before = {name: np.array(p.to(ms.float32).asnumpy()) for name, p in transformer.parameters_and_names()}
    losses = [float(step(*map(ms.Tensor, make_batch(2)))[1]) for _ in range(2)]
    assert losses[0] == pytest.approx(two_updates(1)[0][0, 0], rel=1e-2)
    trained = lora.lora_parameters(transformer).values()
    assert {id(p) for p in trained} == {id(p) for p in transformer.get_parameters() if p.requires_grad}
    for name, parameter in transformer.parameters_and_names():
        same = np.array_equal(before[name], parameter.to(ms.float32).asnumpy())
        assert same != parameter.requires_grad, name
        assert not parameter.requires_grad or parameter.dtype == ms.float32
    assert not before["x_embedder.base_layer.weight"][:, 64:].any()


# ---- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [[], ["--center_crop"], ["--random_flip"]], ids=["random", "center", "flips"])
def test_a_condition_is_cropped_and_flipped_with_its_image(batches, crop):
    """Its colours are those of the image's negative, pixel by pixel."""
    made = batches("--resolution", 16, "--aspect_ratio_buckets", "16,16", "--train_batch_size", 2, *crop)
    flipped = set()
    for number in range(8):
        images, conditions, posterior, noise, indices, *_, ids = made.make(made.data.uses(number))
        np.testing.assert_allclose(conditions, -images, atol=3 / 127.5)
        flipped |= set((images[:, 0, 0, 0] > images[:, 0, 0, -1]).tolist())
        assert noise.shape == posterior.shape == (2, 16, 2, 2) and indices.shape == (2,)
        assert not np.array_equal(noise[0], noise[1]) and ids.tolist() == [[0, 0, 0]]
    assert flipped == ({True, False} if crop == ["--random_flip"] else {False})


@pytest.mark.parametrize("more", [["--cache_latents"], ["--random_flip"]], ids=["cached", "flips"])
def test_masked_images_and_masks_of_a_batch(batches, masked, more):
    """Pixels under the mask are 0, as FluxFillPipeline has them; masks of the data set are flipped with the images."""
    made = batches("--fill", "--train_data_dir", masked, *more)
    random = []
    for number in range(12):
        (use,) = made.data.uses(number)
        batch = made.make([use])
        height, width = use.size
        mask = batch[8].reshape(1, 8, 8, height // 8, width // 8).transpose(0, 3, 1, 4, 2).reshape(height, width)
        assert set(np.unique(mask)) <= {0.0, 1.0}
        pixels = made.make([use])[1][0]
        assert not pixels[:, mask == 1].any()
        image = np.asarray(use.sample.image.open().convert("RGB"), np.float32).transpose(2, 0, 1) / 127.5 - 1
        flip = "--random_flip" in more and use.draws.flip(True)
        image = image[..., ::-1] if flip else image
        np.testing.assert_array_equal(pixels[:, mask == 0], image[:, mask == 0])
        if use.sample.condition is None:
            random.append(mask)
            continue
        expected = np.asarray(half_mask(height, width)) >= 128
        np.testing.assert_array_equal(mask, expected[:, ::-1] if flip else expected)
    assert len(random) == 4 and not any(np.array_equal(one, other) for one, other in zip(random[:2], random[2:]))


def test_a_held_out_pair_keeps_its_random_mask(batches, masked):
    """At all timesteps, in every validation."""
    made = batches("--fill", "--train_data_dir", masked, "--validation_split", 0.5)
    ids = [number for number, pair in enumerate(made.data.held_out) if pair.condition is None]
    masks = [made.make([made.data.held_out_use(ids[0], timestep)])[8] for timestep in (10, 900)]
    np.testing.assert_array_equal(*masks)
