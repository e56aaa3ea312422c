"""The training step: its loss against NumPy, both modes against each other, and what it may and may not change."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from mindtune import flow, rng
from mindtune.models import configs, lora, precision
from mindtune.models.gradient_checkpointing import recompute_blocks
from mindtune.models.loading import load_model
from mindtune.models.lora_settings import TEXT_ENCODER_TARGETS, TRANSFORMER_TARGETS
from mindtune.optim import adamw

SHIFT, SCALE = 0.1159, 0.3611
SIGMAS = (np.arange(1000, 0, -1) / 1000).astype(np.float32)


class LinearFlux(nn.Cell):
    """Stands in for the transformer with a formula NumPy can repeat: a token times a trained number plus its sigma."""

    def __init__(self):
        super().__init__()
        self.gain = ms.Parameter(ms.Tensor(0.5, ms.float32), name="gain")
        self.config = {"guidance_embeds": True}

    def construct(
        self,
        hidden_states,
        timestep,
        guidance,
        pooled_projections,
        encoder_hidden_states,
        txt_ids,
        img_ids,
        return_dict,
    ):
        text = encoder_hidden_states.mean(axis=(1, 2)) + pooled_projections.mean(axis=1)
        return (self.gain * hidden_states + (timestep + 0.01 * guidance + text).reshape((-1, 1, 1)),)


def make_step(script, flags, transformer, *more, optimizer=None, scaler=None, text_encoder=None):
    args = script.parse_args(flags("unused", "--max_sequence_length", 5, *more))
    if optimizer is None:
        optimizer = adamw.AdamW([{"params": transformer.trainable_params(), "lr": 1e-2, "weight_decay": 0.0}])
    return script.TrainStepForFluxDevDB(
        transformer,
        optimizer,
        scaler or precision.loss_scaler("no"),
        args,
        vae=None,
        text_encoder=text_encoder,
        vae_config={"scaling_factor": SCALE, "shift_factor": SHIFT},
        sigmas=SIGMAS,
    )


def make_batch(size, channels=16, text_dim=32, pooled_dim=32, height=4, width=6):
    """Moments with a log-variance that matters, and a different index for every image."""
    moments = rng.normal(1, "moments", shape=(size, 2 * channels, height, width))
    posterior = rng.normal(1, "posterior", shape=(size, channels, height, width))
    noise = rng.normal(1, "noise", shape=(size, channels, height, width))
    indices = np.array([100, 900, 500, 300][:size], np.int32)
    text = rng.normal(1, "text", shape=(size, 5, text_dim))
    pooled = rng.normal(1, "pooled", shape=(size, pooled_dim))
    return moments, posterior, noise, indices, text, pooled, flow.latent_image_ids(height, width)


def numpy_loss(batch, scheme, prior_weight=None, gain=0.5, guidance=3.5, value=lambda error, sigma, number: error**2):
    """The loss of `LinearFlux` sample by sample in float64, straight from docs/flux_lora.md."""
    errors = []
    samples = zip(*(np.asarray(part, np.float64) for part in batch[:6]))
    for number, (moments, posterior, noise, index, text, pooled) in enumerate(samples):
        mean, logvar = np.split(moments, 2)
        x = (mean + np.exp(0.5 * np.clip(logvar, -30, 20)) * posterior - SHIFT) * SCALE
        sigma = float(SIGMAS[int(index)])
        noisy = sigma * noise + (1 - sigma) * x
        # The stand-in adds one number a sample, so packing and unpacking must cancel for this to agree.
        prediction = gain * noisy + sigma + 0.01 * guidance + text.mean() + pooled.mean()
        weight = {"sigma_sqrt": sigma**-2, "cosmap": 2 / (np.pi * (1 - 2 * sigma + 2 * sigma**2))}.get(scheme, 1.0)
        errors.append(weight * np.mean(value(prediction - (noise - x), sigma, number)))
    if prior_weight is None:
        return np.mean(errors)
    half = len(errors) // 2
    return np.mean(errors[:half]) + prior_weight * np.mean(errors[half:])


@pytest.mark.parametrize("scheme", flow.WEIGHTING_SCHEMES)
def test_loss_of_every_weighting_is_the_formulas(lora_script, flags, mode, scheme):
    step, batch = make_step(lora_script, flags, LinearFlux(), "--weighting_scheme", scheme), make_batch(3)
    assert float(step(*map(ms.Tensor, batch))[1]) == pytest.approx(numpy_loss(batch, scheme), rel=1e-5)


@pytest.mark.parametrize("schedule", flow.HUBER_SCHEDULES)
@pytest.mark.parametrize("loss", ["huber", "smooth_l1"])
def test_huber_losses_with_weights_per_latent(lora_script, flags, mode, loss, schedule):
    """Each sample has the delta of its own sigma, and its own weights per latent."""
    more = ["--loss", loss, "--huber_delta", 0.2, "--huber_schedule", schedule]
    step, batch = make_step(lora_script, flags, LinearFlux(), *more), make_batch(3)
    weights = np.random.default_rng(3).random((3, 1, 4, 6)).astype(np.float32)

    def value(error, sigma, index):
        delta = {"constant": 0.2, "exponential": 0.2**sigma, "snr": 0.8 * (1 - sigma) ** 2 + 0.2}[schedule]
        losses = 2 * (np.sqrt(error**2 + delta**2) - delta) * (delta if loss == "huber" else 1)
        return losses * weights[index]

    expected = numpy_loss(batch, "none", value=value)
    assert float(step(*map(ms.Tensor, (*batch, weights)))[1]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt"])
def test_prior_preservation_weighs_every_half_with_its_own_sigmas(lora_script, flags, mode, tmp_path, scheme):
    prior = ["--with_prior_preservation", "--class_data_dir", tmp_path, "--class_prompt", "a cat"]
    more = [*prior, "--prior_loss_weight", 0.3, "--weighting_scheme", scheme]
    step = make_step(lora_script, flags, LinearFlux(), *more)
    batch = make_batch(4)
    assert float(step(*map(ms.Tensor, batch))[1]) == pytest.approx(
        numpy_loss(batch, scheme, prior_weight=0.3), rel=1e-5
    )


def test_gradient_is_the_losss_derivative(lora_script, flags, mode):
    """One plain gradient-descent step moves the number by -lr dL/dgain, clipped to norm 1."""
    transformer, batch = LinearFlux(), make_batch(3)
    step = make_step(lora_script, flags, transformer, optimizer=nn.SGD(transformer.trainable_params(), 0.1))
    step(*map(ms.Tensor, batch))
    slope = (numpy_loss(batch, "none", gain=0.5 + 1e-4) - numpy_loss(batch, "none", gain=0.5 - 1e-4)) / 2e-4
    assert float(step.grad_clipper.norm) == pytest.approx(abs(slope), rel=1e-4)
    assert float(transformer.gain) == pytest.approx(0.5 - 0.1 * np.clip(slope, -1, 1), rel=1e-5)


@pytest.mark.parametrize("mixed_precision", ["no", "fp16"])
def test_two_micro_batches_equal_one_batch_of_two(lora_script, flags, mode, mixed_precision):
    moments = {}
    for accumulation in (1, 2):
        transformer = LinearFlux()
        scaler = precision.loss_scaler(mixed_precision)
        step = make_step(lora_script, flags, transformer, "--gradient_accumulation_steps", accumulation, scaler=scaler)
        batch = make_batch(2)
        for k in range(accumulation):
            step(*(ms.Tensor(part[k : k + 1] if accumulation == 2 else part) for part in batch))
        moments[accumulation] = step.optimizer.exp_avg[0].asnumpy(), transformer.gain.asnumpy()
    np.testing.assert_allclose(moments[2], moments[1], rtol=1e-5)


# ---- the real transformer ------------------------------------------------------------------------


def lora_step(script, flags, small_flux, mixed_precision="no"):
    """A step on the small pipeline's transformer with a LoRA whose B is not zero, so that A has a gradient too."""
    dtypes = precision.resolve_precision(mixed_precision)
    transformer = load_model(small_flux, "transformer", dtypes)
    precision.freeze_params(transformer)
    lora.add_lora(transformer, lora.target_ranks(transformer, TRANSFORMER_TARGETS, 4), 1.0, 0.0, dtypes.compute)
    precision.cast_training_params([transformer])
    lora.init_lora(transformer, seed=0)
    for name, parameter in lora.lora_parameters(transformer).items():
        if ".lora_B." in name:
            parameter.set_data(ms.Tensor(0.1 * rng.normal(0, name, shape=parameter.shape)))
    return make_step(script, flags, transformer, "--mixed_precision", mixed_precision), transformer


@pytest.fixture(scope="module")
def two_updates(lora_script, flags, small_flux):
    """two_updates(mode, recomputed): losses and gradient norms [2, 2], and trained weights. Each runs once."""
    done = {}

    def run(mode, recomputed=0):
        if (mode, recomputed) not in done:
            before = ms.get_context("mode")
            ms.set_context(mode=mode)
            step, transformer = lora_step(lora_script, flags, small_flux)
            recompute_blocks(recomputed, transformer)
            batch = [ms.Tensor(part) for part in make_batch(2)]
            seen = [(float(step(*batch)[1]), float(step.grad_clipper.norm)) for _ in range(2)]
            weights = {name: p.asnumpy() for name, p in lora.lora_parameters(transformer).items()}
            ms.set_context(mode=before)
            done[mode, recomputed] = np.array(seen), weights
        return done[mode, recomputed]

    return run


def test_graph_equals_pynative(two_updates):
    seen, weights = two_updates(1)
    graph_seen, graph_weights = two_updates(0)
    np.testing.assert_allclose(seen, graph_seen, rtol=1e-4)
    for name, value in weights.items():
        np.testing.assert_allclose(value, graph_weights[name], atol=1e-4 * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("mode, recomputed", [(0, 1), (1, 1), (1, 1000)])
def test_gradient_checkpointing_changes_no_gradient(two_updates, mode, recomputed):
    """One block or all; test_flux_blocks.py recomputes all in the graph.

    The gradient norm of the second update depends on every gradient of the first.
    """
    np.testing.assert_array_equal(two_updates(mode, recomputed)[0], two_updates(mode)[0])


@pytest.mark.parametrize("mixed_precision", ["no", "fp16", "bf16"])
def test_frozen_parameters_keep_their_bits_and_every_trainable_moves(
    lora_script, flags, small_flux, two_updates, mixed_precision
):
    """Storage and computation in half precision change the loss by a few thousandths at most."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    step, transformer = lora_step(lora_script, flags, small_flux, mixed_precision)
    before = {name: np.array(p.to(ms.float32).asnumpy()) for name, p in transformer.parameters_and_names()}
    losses = [float(step(*map(ms.Tensor, make_batch(2)))[1]) for _ in range(2)]
    assert losses[0] == pytest.approx(two_updates(0)[0][0, 0], rel=5e-3)
    for name, parameter in transformer.parameters_and_names():
        same = np.array_equal(before[name], parameter.to(ms.float32).asnumpy())
        assert same != parameter.requires_grad, name
        dtype = ms.float32 if parameter.requires_grad else precision.DTYPES[mixed_precision]
        assert parameter.dtype == dtype, name


def test_half_precision_in_the_graph(lora_script, flags, small_flux, two_updates):
    """In bf16; the ControlNet's tests compile fp16."""
    before = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    step, _ = lora_step(lora_script, flags, small_flux, "bf16")
    loss = float(step(*map(ms.Tensor, make_batch(2)))[1])
    ms.set_context(mode=before)
    assert loss == pytest.approx(two_updates(0)[0][0, 0], rel=5e-3)


def test_an_overflow_in_fp16_skips_the_update_and_halves_the_scale(lora_script, flags, mode):
    transformer = LinearFlux()
    scaler = precision.loss_scaler("fp16")
    step = make_step(lora_script, flags, transformer, scaler=scaler)
    batch = list(make_batch(2))
    batch[0] = np.full_like(batch[0], 1e30)
    step(*map(ms.Tensor, batch))
    assert float(transformer.gain) == 0.5
    assert float(scaler.scale_value) == 2.0**15
    step(*map(ms.Tensor, make_batch(2)))
    assert float(transformer.gain) != 0.5


def test_clip_trains_with_its_own_rate_and_decay(lora_script, flags, tiny_flux, mode):
    """Batch 2 with CLIP inside the step: its LoRA moves by its own learning rate, CLIP's frozen weights do not."""
    dtypes = precision.resolve_precision("no")
    text_encoder = load_model(tiny_flux, "text_encoder", dtypes)
    precision.freeze_params(text_encoder)
    lora.add_lora(text_encoder, lora.target_ranks(text_encoder, TEXT_ENCODER_TARGETS, 4), 1.0, 0.0, dtypes.compute)
    lora.init_lora(text_encoder, seed=0)
    transformer = LinearFlux()
    optimizer = adamw.AdamW(
        [
            {"params": transformer.trainable_params(), "lr": 1e-2, "weight_decay": 0.0},
            {"params": text_encoder.trainable_params(), "lr": 1e-3, "weight_decay": 0.0},
        ]
    )
    step = make_step(lora_script, flags, transformer, optimizer=optimizer, text_encoder=text_encoder)
    before = {name: p.asnumpy().copy() for name, p in text_encoder.parameters_and_names()}
    ids = np.tile(np.arange(77, dtype=np.int32), (2, 1))
    ids[:, 10:] = configs.read_config(tiny_flux, "text_encoder")["eos_token_id"]
    step(*map(ms.Tensor, (*make_batch(2)[:5], ids, make_batch(2)[6])))
    moved = {name: np.abs(p.asnumpy() - before[name]).max() for name, p in text_encoder.parameters_and_names()}
    assert all(distance == 0 for name, distance in moved.items() if ".lora_" not in name)
    # Adam's first step is the learning rate where the gradient is well above epsilon. B starts at 0: A has no gradient.
    largest = max(distance for name, distance in moved.items() if ".lora_B." in name)
    assert largest == pytest.approx(1e-3, rel=1e-2)
    assert abs(float(transformer.gain) - 0.5) == pytest.approx(1e-2, rel=1e-3)
