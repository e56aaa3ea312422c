"""The training step: its loss against plain model calls in float64, both modes, and what an update changes."""

import mindone.diffusers
import mindspore as ms
import numpy as np
import pytest

from mindtune import diffusion, flow, rng
from mindtune.models import controlnets, loading, named_parameters, precision
from mindtune.models.gradient_checkpointing import recompute_blocks
from mindtune.optim import adamw

SCALE = 0.18215
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
ALPHAS = diffusion.alphas_cumprod(SCHEDULER)
ALL = 1000  # blocks to recompute
ADDED = ("controlnet_down_blocks.", "controlnet_mid_block.", "controlnet_cond_embedding.conv_out.")


def make_models(sd, kind="no", perturbed=True, recomputed=0):
    """ControlNet and frozen UNet as in `main`. `perturbed`: with projections that are not 0: all train."""
    kind = precision.resolve_precision(kind)
    unet = loading.load_model(sd.root, "unet", kind)
    precision.freeze_params(unet)
    controlnet = controlnets.unet_controlnet(unet, 0)
    precision.set_compute_dtype(controlnet, kind.compute).set_train(True)
    for name, parameter in named_parameters.model_parameters(controlnet).items():
        parameter.requires_grad = True
        if perturbed and name.startswith(ADDED):
            parameter.set_data(ms.Tensor(0.1 * rng.normal(0, name, shape=parameter.shape)))
    recompute_blocks(recomputed, controlnet, unet)
    return controlnet, unet


def make_step(sd, controlnet, unet, kind="no", predicted="epsilon", vae_config=None, scaler=None, **flags):
    flags = {"max_grad_norm": 0, "mixed_precision": kind, **flags}
    words = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    args = sd.train.parse_args(["--pretrained_model_name_or_path=x", "--train_data_dir=x", *words])
    # Without a decaying first moment and without clipping, AdamW's first moment is the gradient.
    optimizer = adamw.AdamW([{"params": controlnet.trainable_params(), "lr": 1e-2, "weight_decay": 0.0}], beta1=0.0)
    more = {"vae_dtype": ms.float32} if sd.kind == "sdxl" else {}
    make = sd.train.TrainStepForControlNetSDXL if sd.kind == "sdxl" else sd.train.TrainStepForControlNet
    return make(
        controlnet,
        optimizer,
        scaler or precision.loss_scaler(kind),
        args,
        unet=unet,
        vae=None,
        vae_config=vae_config or {"scaling_factor": SCALE},
        scheduler_config={**SCHEDULER, "prediction_type": predicted},
        **more,
    )


def make_batch(sd, size, height=8, width=12):
    """Moments with a log-variance that matters, not square, another timestep for every image."""
    images = rng.normal(1, "images", shape=(size, 8, height, width))
    condition = rng.normal(1, "c", shape=(size, 3, 8 * height, 8 * width))
    posterior, noise = (rng.normal(1, name, shape=(size, 4, height, width)) for name in ("posterior", "noise"))
    timesteps = np.array([20, 900, 400][:size], np.int32)
    batch = images, 1 / (1 + np.exp(-condition)), posterior, noise, timesteps
    if sd.kind == "sd15":
        return *batch, rng.normal(1, "text", shape=(size, 77, 32))
    time_ids = np.array([[64, 96, 3 * k, 0, 64, 96] for k in range(size)], np.float32)
    return *batch, rng.normal(1, "text", shape=(size, 77, 48)), rng.normal(1, "pooled", shape=(size, 16)), time_ids


@pytest.fixture(scope="module")
def first_updates():
    return {}


@pytest.fixture
def first_update(sd, first_updates):
    """first_update(mode, kind, recomputed): loss and every gradient at batch size 2. Every combination runs once."""

    def run(mode, kind="no", recomputed=0):
        key = sd.kind, mode, kind, recomputed
        if key not in first_updates:
            before = ms.get_context("mode")
            ms.set_context(mode=mode)
            controlnet, unet = make_models(sd, kind, recomputed=recomputed)
            step = make_step(sd, controlnet, unet, kind)
            loss = float(step(*map(ms.Tensor, make_batch(sd, 2)))[1])
            names = named_parameters.model_parameters(controlnet)
            first_updates[key] = loss, {name: moment.asnumpy() for name, moment in zip(names, step.optimizer.exp_avg)}
            ms.set_context(mode=before)
        return first_updates[key]

    return run


def close(gradients, others, rtol):
    """Within `rtol` of the largest entry of every parameter's gradient."""
    assert gradients.keys() == others.keys()
    for name, value in gradients.items():
        assert np.abs(value).max() > 0, f"{name} has no gradient"
        np.testing.assert_allclose(others[name], value, rtol=0, atol=rtol * np.abs(value).max(), err_msg=name)


@pytest.fixture
def plain_prediction(sd):
    """mindone's own classes on the inputs that the formulas give: (prediction, latents, alphas) in float64."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    controlnet, _ = make_models(sd)
    plain_unet = mindone.diffusers.UNet2DConditionModel.from_pretrained(str(sd.root / "unet"))
    plain_control = mindone.diffusers.ControlNetModel.from_unet(plain_unet)
    for name, parameter in named_parameters.model_parameters(plain_control).items():
        parameter.set_data(ms.Tensor(named_parameters.model_parameters(controlnet)[name].asnumpy()))

    batch = make_batch(sd, 2)
    mean, logvar = np.split(batch[0].astype(np.float64), 2, axis=1)
    x = (mean + np.exp(0.5 * np.clip(logvar, -30, 20)) * batch[2]) * SCALE
    alphas = ALPHAS[batch[4]].reshape(-1, 1, 1, 1)
    noisy = ms.Tensor((np.sqrt(alphas) * x + np.sqrt(1 - alphas) * batch[3]).astype(np.float32))
    more = (
        {"added_cond_kwargs": {"text_embeds": ms.Tensor(batch[6]), "time_ids": ms.Tensor(batch[7])}}
        if sd.kind == "sdxl"
        else {}
    )
    given = (noisy, ms.Tensor(batch[4]), ms.Tensor(batch[5]))
    down, mid = plain_control(*given, controlnet_cond=ms.Tensor(batch[1]), return_dict=False, **more)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    return plain_unet(*given, return_dict=False, **residuals, **more)[0].asnumpy().astype(np.float64), x, alphas


def test_latents_of_a_vae_with_a_mean_and_a_standard_deviation_per_channel(sd):
    """Playground 2.5's: (z - mean) scaling_factor / std. The target is sqrt(a) noise - sqrt(1 - a) latents."""
    mean, std = [-1.6, 1.9, -1.4, 2.5], [8.5, 5.9, 6.5, 5.2]
    vae = {"scaling_factor": 0.5, "shift_factor": None, "latents_mean": mean, "latents_std": std}
    ms.set_context(mode=ms.PYNATIVE_MODE)
    step, batch = make_step(sd, *make_models(sd), predicted="v_prediction", vae_config=vae), make_batch(sd, 2)
    target = step.predict(*map(ms.Tensor, batch))[1].asnumpy()
    z = batch[0][:, :4] + np.exp(0.5 * np.clip(batch[0][:, 4:], -30, 20)) * batch[2]
    latents = (z - np.reshape(mean, (1, 4, 1, 1))) * 0.5 / np.reshape(std, (1, 4, 1, 1))
    alphas = ALPHAS[batch[4]].reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(target, np.sqrt(alphas) * batch[3] - np.sqrt(1 - alphas) * latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("predicted", ["epsilon", "v_prediction"])
def test_the_steps_loss_is_the_formulas(sd, plain_prediction, predicted, gamma):
    prediction, x, alphas = plain_prediction
    batch = make_batch(sd, 2)
    target = batch[3] if predicted == "epsilon" else np.sqrt(alphas) * batch[3] - np.sqrt(1 - alphas) * x
    snr = alphas / (1 - alphas)
    weight = 1.0 if gamma is None else np.minimum(snr, gamma) / (snr if predicted == "epsilon" else snr + 1)
    step = make_step(sd, *make_models(sd), predicted=predicted, snr_gamma=gamma)
    loss = float(step.forward(*map(ms.Tensor, batch))[1])
    assert loss == pytest.approx(np.mean(weight * (prediction - target) ** 2), rel=1e-5)


def test_loss_and_gradients_of_the_graph_are_pynatives(first_update):
    assert first_update(0)[0] == pytest.approx(first_update(1)[0], rel=1e-5)
    close(first_update(1)[1], first_update(0)[1], rtol=1e-4)


@pytest.mark.parametrize("recomputed", [3, ALL])
def test_gradient_checkpointing_changes_no_gradient(first_update, recomputed):
    close(first_update(1)[1], first_update(1, recomputed=recomputed)[1], rtol=1e-5)
    assert first_update(1, recomputed=recomputed)[0] == first_update(1)[0]


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


def test_two_micro_batches_equal_one_batch_of_two(sd, first_update):
    """In PyNative; the FLUX scripts' tests accumulate in the graph."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    controlnet, unet = make_models(sd)
    step = make_step(sd, controlnet, unet, gradient_accumulation_steps=2)
    for k in range(2):
        step(*(ms.Tensor(part[k : k + 1]) for part in make_batch(sd, 2)))
    gradients = {
        name: moment.asnumpy()
        for name, moment in zip(named_parameters.model_parameters(controlnet), step.optimizer.exp_avg)
    }
    close(first_update(1)[1], gradients, rtol=1e-4)


@pytest.mark.parametrize("kind, height, width", [("no", 8, 8), ("no", 9, 13), ("fp16", 9, 13), ("bf16", 9, 13)])
def test_the_first_prediction_is_the_base_models_bit_for_bit(sd, kind, height, width):
    """Zero projections add zeros, also if a side is odd on every level. Once they are not zero, the condition shows."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    controlnet, unet = make_models(sd, kind, perturbed=False)
    compute = precision.resolve_precision(kind).compute
    step, batch = make_step(sd, controlnet, unet, kind), make_batch(sd, 2, height, width)
    predict = lambda: step.predict(*map(ms.Tensor, batch))[0].to(ms.float32).asnumpy()  # noqa: E731
    first = predict()
    latents = flow.sample_posterior(ms.Tensor(batch[0]), ms.Tensor(batch[2])) * SCALE
    alphas = ms.Tensor(ALPHAS[batch[4]].reshape(-1, 1, 1, 1), ms.float32)
    noisy = diffusion.add_noise(latents, ms.Tensor(batch[3]), alphas).to(compute)
    more = {}
    if sd.kind == "sdxl":
        more["added_cond_kwargs"] = {"text_embeds": ms.Tensor(batch[6]).to(compute), "time_ids": ms.Tensor(batch[7])}
    base = unet(noisy, ms.Tensor(batch[4]), ms.Tensor(batch[5]).to(compute), return_dict=False, **more)[0]
    np.testing.assert_array_equal(first, base.to(ms.float32).asnumpy())

    for name, parameter in named_parameters.model_parameters(controlnet).items():
        if name.startswith(ADDED):
            parameter.set_data(ms.Tensor(0.1 * rng.normal(0, name, shape=parameter.shape)))
    followed = predict()
    assert np.abs(followed - first).max() > 1e-2
    batch = (batch[0], batch[1][::-1].copy(), *batch[2:])
    assert np.abs(predict() - followed).max() > 1e-4


def test_a_new_controlnet_is_a_copy_of_the_unets_first_half(sd):
    controlnet, unet = make_models(sd, "fp16", perturbed=False)
    theirs = named_parameters.model_parameters(unet)
    for name, parameter in named_parameters.model_parameters(controlnet).items():
        assert parameter.dtype == ms.float32
        value = parameter.asnumpy()
        if name.startswith(ADDED):
            assert not value.any(), name
        elif name.startswith("controlnet_cond_embedding."):
            fan_in = np.prod(
                named_parameters.model_parameters(controlnet)[name.rpartition(".")[0] + ".weight"].shape[1:]
            )
            assert 0.5 / np.sqrt(fan_in) < np.abs(value).max() <= 1 / np.sqrt(fan_in), name
        else:
            np.testing.assert_array_equal(value, theirs.pop(name).to(ms.float32).asnumpy(), err_msg=name)
    assert theirs and all(name.startswith(("up_blocks.", "conv_norm_out.", "conv_out.")) for name in theirs)
    again, other = (named_parameters.model_parameters(controlnets.unet_controlnet(unet, seed)) for seed in (0, 1))
    name = "controlnet_cond_embedding.conv_in.weight"
    np.testing.assert_array_equal(again[name].asnumpy(), named_parameters.model_parameters(controlnet)[name].asnumpy())
    assert not np.array_equal(other[name].asnumpy(), again[name].asnumpy())


@pytest.mark.parametrize("kind", ["no", "fp16", "bf16"])
def test_an_update_changes_the_controlnet_and_nothing_else(sd, kind):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    controlnet, unet = make_models(sd, kind)
    step = make_step(sd, controlnet, unet, kind)
    values = lambda model: {  # noqa: E731
        name: np.array(p.to(ms.float32).asnumpy()) for name, p in named_parameters.model_parameters(model).items()
    }
    before, frozen = values(controlnet), values(unet)
    step(*map(ms.Tensor, make_batch(sd, 2)))
    for name, value in values(controlnet).items():
        assert not np.array_equal(value, before[name]), f"{name} did not move"
    for name, value in values(unet).items():
        np.testing.assert_array_equal(value, frozen[name], err_msg=name)
    assert {p.dtype for p in unet.get_parameters()} == {precision.DTYPES[kind]}


def test_an_overflow_in_fp16_skips_the_update_and_halves_the_scale(sd):
    """Parameters and moments untouched; the next good batch trains."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    controlnet, unet = make_models(sd, "fp16")
    scaler = precision.loss_scaler("fp16")
    step = make_step(sd, controlnet, unet, "fp16", scaler=scaler)
    everything = lambda: [p.asnumpy().copy() for p in (*controlnet.get_parameters(), *step.optimizer.get_parameters())]  # noqa: E731
    before, batch = everything(), list(make_batch(sd, 2))
    batch[3] = np.full_like(batch[3], 1e30)
    step(*map(ms.Tensor, batch))
    for value, untouched in zip(everything(), before):
        np.testing.assert_array_equal(value, untouched)
    assert float(scaler.scale_value) == 2.0**15
    step(*map(ms.Tensor, make_batch(sd, 2)))
    assert any(not np.array_equal(value, untouched) for value, untouched in zip(everything(), before))
