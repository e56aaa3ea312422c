"""The step of Kontext: its loss against NumPy and plain model calls, both modes, and the LoRA script's without sources.

Batches: the ids of targets and sources, sizes of their own, and crops.
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
    LinearFlux,
    assert_modes_agree,
    latents_of,
    numpy_moments,
    packed,
    unpacked,
    updates_in_modes,
)
from mindspore import nn

from mindtune import flow, rng
from mindtune.data.crops import pixel_values
from mindtune.models import loading, lora, lora_settings, precision, replaced_layers
from mindtune.optim import adamw

TARGETS = lora_settings.DEFAULT_TARGETS["flux_kontext"]
CONFIG = {"scaling_factor": SCALE, "shift_factor": SHIFT}


def make_step(script, flags, transformer, *more, optimizer=None, vae=None):
    args = script.parse_args(flags("unused", "--max_sequence_length", 5, *more))
    if optimizer is None:
        optimizer = adamw.AdamW([{"params": transformer.trainable_params(), "lr": 1e-2, "weight_decay": 0.0}])
    models = {"vae": vae, "vae_config": CONFIG, "sigmas": SIGMAS}
    scaler = precision.loss_scaler("no")
    if hasattr(script, "TrainStepForFluxDevDB"):
        return script.TrainStepForFluxDevDB(transformer, optimizer, scaler, args, text_encoder=None, **models)
    return script.TrainStepForFluxKontext(transformer, optimizer, scaler, args, **models)


def make_batch(size, source=(6, 2), height=4, width=6):
    """Not square, another index for every image, a log-variance that matters; a source of `source` latents or None."""
    moments, posterior, noise = (
        rng.normal(1, name, shape=(size, count, height, width))
        for name, count in (("moments", 32), ("posterior", 16), ("noise", 16))
    )
    indices = np.array([100, 900, 500][:size], np.int32)
    text, pooled = rng.normal(1, "text", shape=(size, 5, 32)), rng.normal(1, "pooled", shape=(size, 32))
    ids = flow.latent_image_ids(height, width)
    if source is None:
        return moments, posterior, noise, indices, text, pooled, ids
    rows, columns = np.mgrid[0 : source[0] // 2, 0 : source[1] // 2]
    own = np.stack([np.ones_like(rows), rows, columns], axis=2).reshape(-1, 3).astype(np.float32)
    sources = rng.normal(1, "source", shape=(size, 32, *source))
    return moments, posterior, noise, indices, text, pooled, np.concatenate([ids, own]), sources


def noisy_parts(batch):
    """(noisy latents, latents, noise, sigmas [B, 1, 1, 1], scaled latents of the sources or None) in float64."""
    moments, posterior, noise, indices = (np.asarray(part, np.float64) for part in batch[:4])
    latents = latents_of(moments, posterior)
    sigma = SIGMAS[0][indices.astype(int)].astype(np.float64).reshape(-1, 1, 1, 1)
    sources = latents_of(batch[7], 0.0) if len(batch) > 7 else None
    return sigma * noise + (1 - sigma) * latents, latents, noise, sigma, sources


def numpy_loss(batch, scheme="none", gain=0.5, guidance=3.5):
    """The loss of `LinearFlux` in float64, without packing: a token is a square of two by two."""
    noisy, latents, noise, sigma, sources = noisy_parts(batch)
    values = [part.reshape(len(part), -1) for part in (noisy, sources) if part is not None]
    mean = np.concatenate(values, axis=1).mean(axis=1)
    text, pooled = (np.asarray(part, np.float64) for part in batch[4:6])
    number = sigma.ravel() + text.mean(axis=(1, 2)) - pooled.mean(axis=1) + 0.01 * guidance + 3.0 * mean
    rows, columns = np.mgrid[0 : noise.shape[2], 0 : noise.shape[3]] // 2
    prediction = gain * noisy + number.reshape(-1, 1, 1, 1) + 0.1 * rows - 0.2 * columns
    weight = {"sigma_sqrt": sigma**-2, "cosmap": 2 / (np.pi * (1 - 2 * sigma + 2 * sigma**2))}.get(scheme, 1.0)
    return np.mean(weight * (prediction - (noise - latents)) ** 2)


@pytest.mark.parametrize(
    "source, scheme",
    [((6, 2), "cosmap"), ((4, 6), "none"), (None, "sigma_sqrt")],
    ids=["own size", "same size", "no source"],
)
def test_the_loss_is_that_of_the_targets_tokens(kontext_script, kontext_flags, mode, source, scheme):
    """Sources count through the attention alone, here the mean of all tokens; their ids start with 1."""
    step = make_step(kontext_script, kontext_flags, LinearFlux(), "--weighting_scheme", scheme)
    batch = make_batch(3, source)
    assert float(step(*map(ms.Tensor, batch))[1]) == pytest.approx(numpy_loss(batch, scheme), rel=1e-5)


@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_without_a_source_it_is_the_step_of_the_lora_script(kontext_script, kontext_flags, lora_script, flags, loss):
    batch, losses = make_batch(2, None), []
    for script, make_flags in ((kontext_script, kontext_flags), (lora_script, flags)):
        step = make_step(script, make_flags, LinearFlux(), "--loss", loss, "--guidance_scale", 2)
        losses.append([float(step(*map(ms.Tensor, batch))[1]) for _ in range(2)])
    assert losses[0] == losses[1]


def test_gradient_is_the_losss_derivative(kontext_script, kontext_flags, mode):
    """One plain gradient-descent step moves the number by -lr dL/dgain, clipped to norm 1."""
    transformer, batch = LinearFlux(), make_batch(2)
    step = make_step(kontext_script, kontext_flags, transformer, optimizer=nn.SGD(transformer.trainable_params(), 0.1))
    step(*map(ms.Tensor, batch))
    slope = (numpy_loss(batch, gain=0.5 + 1e-4) - numpy_loss(batch, gain=0.5 - 1e-4)) / 2e-4
    assert float(step.grad_clipper.norm) == pytest.approx(abs(slope), rel=1e-4)
    assert float(transformer.gain) == pytest.approx(0.5 - 0.1 * np.clip(slope, -1, 1), rel=1e-5)


def test_pixels_are_encoded_in_the_step(kontext_script, kontext_flags, mode):
    """Target and source, of another size. Of the source the mean: no noise of its own."""
    step = make_step(kontext_script, kontext_flags, LinearFlux(), vae=Encoder())
    images, sources = rng.normal(0, "i", shape=(2, 3, 32, 48)), rng.normal(0, "s", shape=(2, 3, 48, 16))
    batch = list(make_batch(2))
    batch[0], batch[7] = images, sources
    found = float(step(*map(ms.Tensor, batch))[1])
    batch[0], batch[7] = numpy_moments(images), numpy_moments(sources)
    assert found == pytest.approx(numpy_loss(batch), rel=1e-5)


def test_a_model_without_guidance_gets_none(kontext_script, kontext_flags):
    step = make_step(kontext_script, kontext_flags, LinearFlux(False), "--guidance_scale", 20)
    assert float(step(*map(ms.Tensor, make_batch(2)))[1]) == pytest.approx(numpy_loss(make_batch(2), guidance=0))


# ---- the real transformer ------------------------------------------------------------------------


def lora_step(script, flags, root, kind="no", int8=False):
    """A step on the small pipeline's transformer with a LoRA whose B is not zero, so that A has a gradient too."""
    dtypes = precision.resolve_precision(kind)
    transformer = loading.load_model(root, "transformer", dtypes, int8=int8)
    precision.freeze_params(transformer)
    settings = lora_settings.Settings(lora_rank=4)
    lora.add_adapters({"transformer": transformer}, settings, {"transformer": TARGETS}, {}, dtypes.compute, seed=0)
    for name, parameter in lora.lora_parameters(transformer).items():
        if ".lora_B." in name:
            parameter.set_data(ms.Tensor(0.1 * rng.normal(0, name, shape=parameter.shape)))
    more = ["--mixed_precision", kind, *(["--base_precision", "int8"] if int8 else [])]
    return make_step(script, flags, transformer, *more), transformer


@pytest.fixture(scope="module")
def two_updates(kontext_script, kontext_flags, small_flux):
    """`updates_in_modes`."""
    return updates_in_modes(lambda: lora_step(kontext_script, kontext_flags, small_flux), make_batch(2))


def test_graph_equals_pynative(two_updates):
    assert_modes_agree(two_updates)


def test_the_loss_is_that_of_mindones_model_called_plainly(kontext_script, kontext_flags, small_flux):
    """mindone's class without our operators, on tokens that were packed by hand; a new LoRA changes nothing."""
    batch = make_batch(2)
    noisy, latents, noise, sigma, sources = noisy_parts(batch)
    plain = mindone.diffusers.FluxTransformer2DModel.from_pretrained(str(small_flux / "transformer"))
    plain.time_text_embed.time_proj = replaced_layers.Timesteps(plain.time_text_embed.time_proj)
    tokens = plain(
        hidden_states=ms.Tensor(np.concatenate([packed(noisy), packed(sources)], axis=1).astype(np.float32)),
        timestep=ms.Tensor(sigma.ravel().astype(np.float32)),
        guidance=ms.Tensor([3.5, 3.5], ms.float32),
        pooled_projections=ms.Tensor(batch[5]),
        encoder_hidden_states=ms.Tensor(batch[4]),
        txt_ids=ms.Tensor(np.zeros((5, 3), np.float32)),
        img_ids=ms.Tensor(batch[6]),
        return_dict=False,
    )[0].asnumpy()
    count = packed(noisy).shape[1]
    expected = np.mean((unpacked(tokens[:, :count].astype(np.float64), 4, 6) - (noise - latents)) ** 2)
    step, transformer = lora_step(kontext_script, kontext_flags, small_flux)
    lora.init_lora(transformer, seed=0)  # B = 0
    assert float(step(*map(ms.Tensor, batch))[1]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind, int8", [("no", True), ("fp16", False), ("bf16", False)], ids=["int8", "fp16", "bf16"])
def test_frozen_parameters_keep_their_bits_and_every_trainable_moves(
    kontext_script, kontext_flags, small_flux, two_updates, kind, int8
):
    step, transformer = lora_step(kontext_script, kontext_flags, small_flux, kind, int8)
    before = {name: np.array(p.to(ms.float32).asnumpy()) for name, p in transformer.parameters_and_names()}
    losses = [float(step(*map(ms.Tensor, make_batch(2)))[1]) for _ in range(2)]
    assert losses[0] == pytest.approx(two_updates(1)[0][0, 0], rel=1e-2)
    trained = lora.lora_parameters(transformer).values()
    assert {id(p) for p in trained} == {id(p) for p in transformer.get_parameters() if p.requires_grad}
    for name, parameter in transformer.parameters_and_names():
        same = np.array_equal(before[name], parameter.to(ms.float32).asnumpy())
        assert same != parameter.requires_grad, name
        assert not parameter.requires_grad or parameter.dtype == ms.float32


def test_the_default_layers_are_those_of_diffusers_example(small_flux):
    """Attention and feed-forward layers of both kinds of blocks; neither embeddings nor modulations."""
    names = list(loading.linear_layers(small_flux, "transformer"))
    chosen = lora_settings.Settings().ranks(names, lora_settings.target_names(None, "flux_kontext"), True)
    left = [name for name in names if name not in chosen]
    parts = {name.split(".")[0] for name in left}
    assert parts == {
        "x_embedder",
        "context_embedder",
        "time_text_embed",
        "transformer_blocks",
        "single_transformer_blocks",
        "norm_out",
        "proj_out",
    }
    assert [name for name in left if "blocks" in name] == [
        "transformer_blocks.0.norm1.linear",
        "transformer_blocks.0.norm1_context.linear",
        "single_transformer_blocks.0.norm.linear",
        "single_transformer_blocks.0.proj_out",
    ]


# ---- batches -------------------------------------------------------------------------------------


def test_a_batch_has_the_sizes_and_ids_of_its_sources(batches):
    """Same shape, another shape, and no source, in buckets of two shapes: a batch never mixes them."""
    made = batches("--train_batch_size", 2)
    seen = set()
    for number in range(12):
        uses = made.data.uses(number)
        images, _, noise, *_, ids = made.make(uses)[:7]
        sources = made.make(uses)[7] if len(made.make(uses)) == 8 else None
        height, width = uses[0].size
        assert images.shape == (2, 3, height, width) and noise.shape == (2, 16, height // 8, width // 8)
        own = None if sources is None else sources.shape[2:]
        seen.add(((height, width), own))
        grids = [(0, (height, width))] + ([(1, own)] if own else [])
        expected = [(first, y, x) for first, (h, w) in grids for y in range(h // 16) for x in range(w // 16)]
        assert ids.tolist() == [list(map(float, row)) for row in expected]
    sizes = (32, 48), (48, 32)
    assert seen == {(size, own) for size in sizes for own in (None, (32, 32), size)}


@pytest.mark.parametrize("crop", [[], ["--center_crop"], ["--random_flip"]], ids=["random", "center", "flips"])
def test_a_source_of_the_targets_shape_is_cropped_and_flipped_with_it(batches, crop):
    """Its colours are those of the target's negative, pixel by pixel. One of another shape is cropped in the middle."""
    made = batches("--resolution", 16, "--aspect_ratio_buckets", "16,16", *crop)
    kinds, flipped = [], set()
    for number in range(18):
        (use,) = made.data.uses(number)
        batch = made.make([use])
        if len(batch) == 7:
            kinds.append("none")
            continue
        image, source = batch[0][0], batch[7][0]
        flipped.add(image[0, 0, 0] > image[0, 0, -1])  # red is the column
        if use.sample.image.size == use.sample.condition.size:
            kinds.append("same")
            np.testing.assert_allclose(source, -image, atol=3 / 127.5)
        else:
            kinds.append("other")
            expected = pixel_values(
                use.sample.condition.open(), 16, "lanczos", flip=bool(image[0, 0, 0] > image[0, 0, -1])
            )
            np.testing.assert_array_equal(source, expected)
    assert [kinds.count(kind) for kind in ("same", "other", "none")] == [6, 6, 6]
    assert flipped == ({True, False} if crop == ["--random_flip"] else {False})


def test_the_same_pair_twice_in_a_batch_has_draws_of_its_own(batches):
    """A bucket has one pair, so a batch of two has it twice."""
    made = batches("--train_batch_size", 2)
    uses = made.data.uses(0)
    images, posterior, noise, *_ = made.make(uses)
    assert uses[0].sample == uses[1].sample and images[0].shape == images[1].shape
    assert not np.array_equal(posterior[0], posterior[1]) and not np.array_equal(noise[0], noise[1])
    assert not np.array_equal(posterior[0], noise[0])
