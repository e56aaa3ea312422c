"""The training step: its loss against NumPy and plain model calls, both modes, and what an update changes."""

import json

import mindone.diffusers
import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from safetensors.numpy import load_file

from mindtune import flow, rng
from mindtune.models import controlnets, loading, named_parameters, precision, replaced_layers
from mindtune.models.gradient_checkpointing import recompute_blocks
from mindtune.models.weights import weight_files
from mindtune.optim import adamw

SHIFT, SCALE = 0.1159, 0.3611
SIGMAS = (np.arange(1000, 0, -1) / 1000).astype(np.float32)
ALL = 1000  # blocks to recompute
ADDED = ("controlnet_x_embedder.", "controlnet_blocks.", "controlnet_single_blocks.")


def make_step(script, flags, controlnet, transformer, *more, kind="no", optimizer=None, scaler=None):
    args = script.parse_args(flags("unused", "--max_sequence_length", 5, "--mixed_precision", kind, *more))
    # Without a first moment's memory and without clipping, AdamW's first moment is the gradient.
    optimizer = optimizer or adamw.AdamW(
        [{"params": controlnet.trainable_params(), "lr": 1e-2, "weight_decay": 0.0}], beta1=0.0
    )
    return script.TrainStepForFluxControlNet(
        controlnet,
        optimizer,
        scaler or precision.loss_scaler(kind),
        args,
        transformer=transformer,
        vae=None,
        vae_config={"scaling_factor": SCALE, "shift_factor": SHIFT},
        sigmas=SIGMAS,
    )


def make_batch(size, height=4, width=6):
    """Moments with a log-variance that matters, not square, another index for every image."""
    moments = [rng.normal(1, name, shape=(size, 32, height, width)) for name in ("images", "conditions")]
    noises = [
        rng.normal(1, name, shape=(size, 16, height, width)) for name in ("posterior", "condition posterior", "noise")
    ]
    text, pooled = rng.normal(1, "text", shape=(size, 5, 32)), rng.normal(1, "pooled", shape=(size, 32))
    indices = np.array([100, 900, 500][:size], np.int32)
    return *moments, *noises, indices, text, pooled, flow.latent_image_ids(height, width)


def latents_and_sigmas(batch):
    """Latents, condition latents and sigmas [B, 1, 1, 1] of a batch in float64, straight from the formulas."""
    images, conditions, posterior, condition_posterior = (np.asarray(part, np.float64) for part in batch[:4])
    both = []
    for moments, noise in ((images, posterior), (conditions, condition_posterior)):
        mean, logvar = np.split(moments, 2, axis=1)
        both.append((mean + np.exp(0.5 * np.clip(logvar, -30, 20)) * noise - SHIFT) * SCALE)
    return *both, SIGMAS[batch[5]].astype(np.float64).reshape(-1, 1, 1, 1)


def numpy_loss(scheme, prediction, noise, x, sigma):
    weight = {"sigma_sqrt": sigma**-2, "cosmap": 2 / (np.pi * (1 - 2 * sigma + 2 * sigma**2))}.get(
        scheme, np.ones_like(sigma)
    )
    return np.mean(weight * (prediction - (noise - x)) ** 2)


# ---- stand-ins that NumPy can repeat -------------------------------------------------------------


class LinearControl(nn.Cell):
    """Stands in for the ControlNet: one residual, a trained number times the tokens and the condition."""

    def __init__(self, guidance=True):
        super().__init__()
        self.gain = ms.Parameter(ms.Tensor(0.3, ms.float32), name="gain")
        self.config = {"guidance_embeds": guidance}

    def construct(self, hidden_states, controlnet_cond, timestep, guidance, pooled_projections, encoder_hidden_states,
                  txt_ids, img_ids, return_dict):  # fmt: skip
        number = timestep + encoder_hidden_states.mean(axis=(1, 2)) - pooled_projections.mean(axis=1)
        number = number if guidance is None else number + 0.01 * guidance
        return [self.gain * (hidden_states + 2.0 * controlnet_cond) + number.reshape((-1, 1, 1))], None


class LinearFlux(nn.Cell):
    """Stands in for the transformer: tokens, their row and column, and the ControlNet's residual."""

    def __init__(self, guidance=True):
        super().__init__()
        self.config = {"guidance_embeds": guidance}

    def construct(self, hidden_states, timestep, guidance, pooled_projections, encoder_hidden_states, txt_ids, img_ids,
                  controlnet_block_samples, controlnet_single_block_samples, return_dict):  # fmt: skip
        number = 0.5 * timestep + encoder_hidden_states.mean(axis=(1, 2)) + pooled_projections.mean(axis=1)
        number = number if guidance is None else number + 0.02 * guidance
        place = (0.1 * img_ids[:, 1] - 0.2 * img_ids[:, 2]).reshape((1, -1, 1))
        return (0.5 * hidden_states + number.reshape((-1, 1, 1)) + place + controlnet_block_samples[0],)


def stand_ins_loss(batch, scheme, gain=0.3, guidance=(3.5, 3.5)):
    """The loss of the two in float64 without packing: a token is a square of two by two."""
    x, condition, sigma = latents_and_sigmas(batch)
    noise, text, pooled = (np.asarray(batch[k], np.float64) for k in (4, 6, 7))
    text, pooled = text.mean(axis=(1, 2)).reshape(-1, 1, 1, 1), pooled.mean(axis=1).reshape(-1, 1, 1, 1)
    noisy = sigma * noise + (1 - sigma) * x
    residual = gain * (noisy + 2 * condition) + sigma + 0.01 * guidance[0] + text - pooled
    rows, columns = np.mgrid[0 : noise.shape[2], 0 : noise.shape[3]] // 2
    prediction = 0.5 * noisy + 0.5 * sigma + 0.02 * guidance[1] + text + pooled + 0.1 * rows - 0.2 * columns + residual
    return numpy_loss(scheme, prediction, noise, x, sigma)


@pytest.mark.parametrize("scheme", flow.WEIGHTING_SCHEMES)
def test_loss_of_every_weighting_is_the_formulas(control_script, control_flags, mode, scheme):
    step = make_step(control_script, control_flags, LinearControl(), LinearFlux(), "--weighting_scheme", scheme)
    batch = make_batch(3)
    assert float(step(*map(ms.Tensor, batch))[1]) == pytest.approx(stand_ins_loss(batch, scheme), rel=1e-5)


def test_gradient_is_the_losss_derivative(control_script, control_flags, mode):
    """One plain gradient-descent step moves the number by -lr dL/dgain, clipped to norm 1."""
    controlnet, batch = LinearControl(), make_batch(3)
    step = make_step(
        control_script, control_flags, controlnet, LinearFlux(), optimizer=nn.SGD(controlnet.trainable_params(), 0.1)
    )
    step(*map(ms.Tensor, batch))
    slope = (stand_ins_loss(batch, "none", gain=0.3001) - stand_ins_loss(batch, "none", gain=0.2999)) / 2e-4
    assert float(step.grad_clipper.norm) == pytest.approx(abs(slope), rel=1e-4)
    assert float(controlnet.gain) == pytest.approx(0.3 - 0.1 * np.clip(slope, -1, 1), rel=1e-5)


@pytest.mark.parametrize("kind", ["no", "fp16"])
def test_two_micro_batches_equal_one_batch_of_two(control_script, control_flags, mode, kind):
    gradients, batch = {}, make_batch(2)
    for accumulation in (1, 2):
        more = ["--gradient_accumulation_steps", accumulation, "--max_grad_norm", 0]
        # Of fp16 only the loss scale: the stand-ins have no layers to compute in half precision.
        scaler = precision.loss_scaler(kind)
        step = make_step(control_script, control_flags, LinearControl(), LinearFlux(), *more, scaler=scaler)
        for k in range(accumulation):
            rows = [part[k : k + 1] if accumulation == 2 else part for part in batch[:-1]]
            step(*map(ms.Tensor, (*rows, batch[-1])))
        gradients[accumulation] = step.optimizer.exp_avg[0].asnumpy()
    slope = (stand_ins_loss(batch, "none", gain=0.3001) - stand_ins_loss(batch, "none", gain=0.2999)) / 2e-4
    np.testing.assert_allclose([gradients[1], gradients[2]], slope, rtol=1e-4)


@pytest.mark.parametrize("control, flux", [(True, False), (False, True)])
def test_only_the_model_with_a_guidance_embedding_is_given_one(control_script, control_flags, mode, control, flux):
    """FLUX.1-schnell has none, and neither have some ControlNets for FLUX.1-dev."""
    step = make_step(control_script, control_flags, LinearControl(control), LinearFlux(flux), "--guidance_scale", 20)
    expected = stand_ins_loss(make_batch(2), "none", guidance=(20 * control, 20 * flux))
    assert float(step(*map(ms.Tensor, make_batch(2)))[1]) == pytest.approx(expected, rel=1e-5)


# ---- the real models -----------------------------------------------------------------------------


def make_models(root, kind="no", double=1, single=1, perturbed=True, recomputed=0):
    """ControlNet and frozen transformer as in `main`. `perturbed`: projections that are not 0: all train."""
    kind = precision.resolve_precision(kind)
    transformer = loading.load_model(root, "transformer", kind)
    precision.freeze_params(transformer)
    controlnet = controlnets.flux_controlnet(root, double, single)
    precision.set_compute_dtype(controlnet, kind.compute).set_train(True)
    for name, parameter in named_parameters.model_parameters(controlnet).items():
        parameter.requires_grad = True
        if perturbed and name.startswith(ADDED):
            parameter.set_data(ms.Tensor(0.1 * rng.normal(0, name, shape=parameter.shape)))
    recompute_blocks(recomputed, controlnet, transformer)
    return controlnet, transformer


@pytest.fixture(scope="module")
def first_update(control_script, control_flags, small_flux):
    """first_update(mode, kind, recomputed): loss and every gradient at batch size 2. Every combination runs once."""
    done = {}

    def run(mode, kind="no", recomputed=0):
        if (mode, kind, recomputed) not in done:
            before = ms.get_context("mode")
            ms.set_context(mode=mode)
            controlnet, transformer = make_models(small_flux, kind, recomputed=recomputed)
            step = make_step(control_script, control_flags, controlnet, transformer, "--max_grad_norm", 0, kind=kind)
            loss = float(step(*map(ms.Tensor, make_batch(2)))[1])
            gradients = {
                name: moment.asnumpy()
                for name, moment in zip(named_parameters.model_parameters(controlnet), step.optimizer.exp_avg)
            }
            done[mode, kind, recomputed] = loss, gradients
            ms.set_context(mode=before)
        return done[mode, kind, recomputed]

    return run


def close(gradients, others, rtol):
    """Within `rtol` of the largest entry of every parameter's gradient."""
    assert gradients.keys() == others.keys()
    for name, value in gradients.items():
        assert np.abs(value).max() > 0, f"{name} has no gradient"
        np.testing.assert_allclose(others[name], value, rtol=0, atol=rtol * np.abs(value).max(), err_msg=name)


def packed(latents):
    """[B, C, H, W] to tokens [B, H/2 * W/2, 4C] by slicing: the corners of 2x2 squares, channels outermost."""
    corners = np.stack([latents[:, :, y::2, x::2] for y in (0, 1) for x in (0, 1)], axis=2)
    return corners.reshape(*corners.shape[:1], -1, corners.shape[3] * corners.shape[4]).transpose(0, 2, 1)


def unpacked(tokens, height, width):
    corners = tokens.transpose(0, 2, 1).reshape(len(tokens), -1, 4, height // 2, width // 2)
    latents = np.empty((len(tokens), corners.shape[1], height, width))
    for k in range(4):
        latents[:, :, k // 2 :: 2, k % 2 :: 2] = corners[:, :, k]
    return latents


def test_the_steps_loss_is_that_of_mindones_models_called_plainly(
    control_script, control_flags, small_flux, first_update
):
    """mindone's classes with exact sinusoids, without our other operators; the error in float64, every weighting."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    controlnet, transformer = make_models(small_flux)
    plain_flux = mindone.diffusers.FluxTransformer2DModel.from_pretrained(str(small_flux / "transformer"))
    plain_control = mindone.diffusers.FluxControlNetModel(**dict(controlnet.config))
    for mine, theirs in ((controlnet, plain_control), (transformer, plain_flux)):
        values = named_parameters.model_parameters(mine)
        for name, parameter in named_parameters.model_parameters(theirs).items():
            parameter.set_data(ms.Tensor(values.pop(name).asnumpy()))
        assert not values
        theirs.time_text_embed.time_proj = replaced_layers.Timesteps(theirs.time_text_embed.time_proj)

    batch = make_batch(2)
    (x, condition, sigma), noise, (text, pooled, ids) = latents_and_sigmas(batch), batch[4], batch[6:]

    def call(model, **more):
        return model(
            hidden_states=ms.Tensor(packed(sigma * noise + (1 - sigma) * x).astype(np.float32)),
            timestep=ms.Tensor(SIGMAS[batch[5]]),
            guidance=ms.Tensor([3.5, 3.5], ms.float32),
            pooled_projections=ms.Tensor(pooled),
            encoder_hidden_states=ms.Tensor(text),
            txt_ids=ms.Tensor(np.zeros((5, 3), np.float32)),
            img_ids=ms.Tensor(ids),
            return_dict=False,
            **more,
        )

    blocks, single_blocks = call(plain_control, controlnet_cond=ms.Tensor(packed(condition).astype(np.float32)))
    tokens = call(plain_flux, controlnet_block_samples=blocks, controlnet_single_block_samples=single_blocks)[0]
    prediction = unpacked(tokens.asnumpy().astype(np.float64), 4, 6)

    for scheme in flow.WEIGHTING_SCHEMES:
        step = make_step(control_script, control_flags, controlnet, transformer, "--weighting_scheme", scheme)
        loss = float(step.forward(*map(ms.Tensor, batch))[1])
        assert loss == pytest.approx(numpy_loss(scheme, prediction, noise, x, sigma), rel=1e-5), scheme
    for mode in (0, 1):
        assert first_update(mode)[0] == pytest.approx(numpy_loss("none", prediction, noise, x, sigma), rel=1e-5)


def test_gradients_of_the_graph_are_pynatives(first_update):
    close(first_update(1)[1], first_update(0)[1], rtol=1e-4)


@pytest.mark.parametrize("mode, recomputed", [(1, 1), (1, 3), (1, ALL), (0, 3)])
def test_gradient_checkpointing_changes_no_gradient(first_update, mode, recomputed):
    """Against the same mode without, with blocks of the ControlNet alone, of both models, and all four."""
    close(first_update(mode)[1], first_update(mode, recomputed=recomputed)[1], rtol=1e-5)
    assert first_update(mode, recomputed=recomputed)[0] == first_update(mode)[0]


class Forward(nn.Cell):
    """The step's loss alone: a graph without gradients compiles in a third of the time."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def construct(self, *batch):
        return self.step.forward(*batch)[1]


def test_loss_in_fp16_is_near_float32s(control_script, control_flags, small_flux, first_update, mode):
    """bf16 has no graph of its own on the CPU, where it is a type of storage only."""
    step = make_step(control_script, control_flags, *make_models(small_flux, "fp16"), kind="fp16")
    assert float(Forward(step)(*map(ms.Tensor, make_batch(2)))) == pytest.approx(first_update(1)[0], rel=1e-2)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_gradients_in_half_precision_are_near_float32s(first_update, kind):
    """Over all weights: the angle between the two is below three degrees, the lengths are within a twentieth."""
    exact, half = (
        np.concatenate([value.ravel() for value in first_update(1, each)[1].values()]) for each in ("no", kind)
    )
    assert first_update(1, kind)[0] == pytest.approx(first_update(1)[0], rel=1e-2)
    lengths = np.linalg.norm(exact), np.linalg.norm(half)
    assert lengths[1] == pytest.approx(lengths[0], rel=0.05)
    assert exact @ half / np.prod(lengths) > np.cos(np.radians(3))


# ---- a new ControlNet ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "double, single, kind", [(1, 1, "no"), (1, 1, "fp16"), (1, 1, "bf16"), (2, 0, "no"), (0, 2, "bf16")]
)
def test_the_first_prediction_is_the_base_models_bit_for_bit(
    control_script, control_flags, tiny_flux, double, single, kind
):
    """Zero projections add zeros; as soon as they are not zero, the condition shows."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    controlnet, transformer = make_models(tiny_flux, kind, double, single, perturbed=False)
    compute = precision.resolve_precision(kind).compute
    step = make_step(control_script, control_flags, controlnet, transformer, kind=kind)
    batch = make_batch(2)
    predict = lambda: step.predict(*map(ms.Tensor, batch))[0].asnumpy()  # noqa: E731
    first = predict()

    noise, sigma = ms.Tensor(batch[4]), ms.Tensor(SIGMAS[batch[5]])
    latents = step.latents(ms.Tensor(batch[0]), ms.Tensor(batch[2]))
    noisy = sigma.reshape((-1, 1, 1, 1)) * noise + (1.0 - sigma.reshape((-1, 1, 1, 1))) * latents
    base = transformer(
        hidden_states=flow.pack_latents(noisy).to(compute), timestep=sigma, guidance=ms.Tensor([3.5, 3.5], ms.float32),
        pooled_projections=ms.Tensor(batch[7]).to(compute), encoder_hidden_states=ms.Tensor(batch[6]).to(compute),
        txt_ids=ms.Tensor(np.zeros((5, 3), np.float32)), img_ids=ms.Tensor(batch[8]), return_dict=False,
    )[0]  # fmt: skip
    np.testing.assert_array_equal(first, flow.unpack_latents(base, 4, 6).asnumpy())

    for name, parameter in named_parameters.model_parameters(controlnet).items():
        if name.startswith(ADDED[1:]):
            parameter.set_data(ms.Tensor(0.1 * rng.normal(0, name, shape=parameter.shape)))
    followed = predict()
    assert np.abs(followed.astype(np.float32) - first.astype(np.float32)).max() > 1e-2
    # The zero condition embedder still hides what is on the condition picture.
    batch = (batch[0], batch[1][::-1].copy(), *batch[2:])
    np.testing.assert_array_equal(predict(), followed)
    embedder = named_parameters.model_parameters(controlnet)["controlnet_x_embedder.weight"]
    embedder.set_data(ms.Tensor(0.1 * rng.normal(0, "x", shape=embedder.shape)))
    assert np.abs(predict().astype(np.float32) - followed.astype(np.float32)).max() > 1e-2


@pytest.mark.parametrize("kind", ["no", "fp16", "bf16"])
def test_a_new_controlnet_is_a_copy_of_the_transformers_first_blocks(tiny_flux, kind):
    """Exactly as the file has them, float32 whatever the computation; frozen ones in half."""
    controlnet, transformer = make_models(tiny_flux, kind, double=1, single=2, perturbed=False)
    assert {parameter.dtype for parameter in transformer.get_parameters()} == {precision.DTYPES[kind]}
    theirs, copied = load_file(weight_files(tiny_flux, "transformer")[0]), 0
    for name, parameter in named_parameters.model_parameters(controlnet).items():
        assert parameter.dtype == ms.float32 and parameter.requires_grad, name
        expected = 0.0 if name.startswith(ADDED) else theirs[name]
        copied += not name.startswith(ADDED)
        np.testing.assert_array_equal(parameter.asnumpy(), expected, err_msg=name)
    # All but the second double block and the output layers.
    left_out = [name for name in theirs if name.startswith(("transformer_blocks.1.", "norm_out.", "proj_out."))]
    assert copied == len(theirs) - len(left_out) > 0


@pytest.mark.parametrize("kind", ["no", "fp16", "bf16"])
def test_an_update_changes_the_controlnet_and_nothing_else(control_script, control_flags, tiny_flux, kind):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    controlnet, transformer = make_models(tiny_flux, kind)
    step = make_step(control_script, control_flags, controlnet, transformer, kind=kind)
    values = lambda model: {  # noqa: E731
        name: np.array(p.to(ms.float32).asnumpy()) for name, p in named_parameters.model_parameters(model).items()
    }
    before, frozen = values(controlnet), values(transformer)
    step(*map(ms.Tensor, make_batch(2)))
    for name, value in values(controlnet).items():
        assert not np.array_equal(value, before[name]), f"{name} did not move"
    for name, value in values(transformer).items():
        np.testing.assert_array_equal(value, frozen[name], err_msg=name)
    assert {p.dtype for p in controlnet.get_parameters()} == {ms.float32}
    assert {p.dtype for p in transformer.get_parameters()} == {precision.DTYPES[kind]}


def test_an_overflow_in_fp16_skips_the_update_and_halves_the_scale(control_script, control_flags, mode):
    controlnet = LinearControl()
    scaler = precision.loss_scaler("fp16")
    step = make_step(control_script, control_flags, controlnet, LinearFlux(), scaler=scaler)
    batch = list(make_batch(2))
    batch[1] = np.full_like(batch[1], 1e30)
    step(*map(ms.Tensor, batch))
    assert float(controlnet.gain) == np.float32(0.3)
    assert float(scaler.scale_value) == 2.0**15
    step(*map(ms.Tensor, make_batch(2)))
    assert float(controlnet.gain) != np.float32(0.3)


# black-forest-labs/FLUX.1-dev, transformer/config.json.
FLUX_DEV = {
    "_class_name": "FluxTransformer2DModel",
    "_diffusers_version": "0.30.0.dev0",
    "_name_or_path": "../checkpoints/flux-dev/transformer",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}


@pytest.mark.parametrize(
    "double, single, parameters", [(4, 0, 1_442_333_696), (4, 4, 2_046_461_952), (4, 10, 2_952_654_336)]
)
def test_parameters_of_a_controlnet_for_flux_dev(tmp_path, double, single, parameters):
    """On parameters that are never allocated."""
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(FLUX_DEV))
    controlnet = controlnets.empty_flux_controlnet(tmp_path, double, single)
    assert sum(parameter.size for parameter in controlnet.get_parameters()) == parameters
