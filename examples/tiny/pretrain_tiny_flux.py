"""Trains a small FLUX from scratch on the data of shapes.py: transformer, CLIP and T5 together.

    python examples/tiny/pretrain_tiny_vae.py WORK/vae      # first; needs PyTorch, see there
    python examples/tiny/pretrain_tiny_flux.py WORK --steps 8000

Expect hours on two CPU cores. Writes WORK/flux-shapes, a complete pipeline directory. An interrupted run resumes from
WORK/state, saved every 250 steps. The parts are those of the training scripts: mindone's FluxTransformer2DModel and
TrainStep, mindtune's mathematics, optimizers and checkpoints. CLIP and T5 are trained too because FLUX gives text
tokens no positions: a frozen random T5 can hardly tell "red on blue" from "blue on red".
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from safetensors.numpy import load_file, save

from mindtune import files, flow, rng
from mindtune.encode.text_encoders import token_ids
from mindtune.models import configs, execution, library, loading, named_parameters, precision, tokenization
from mindtune.models.weights import weight_files
from mindtune.optim import averaging, optimizers, schedules
from mindtune.run import checkpoint

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from make_tiny_pipeline import CAPTIONS, make_flux
from shapes import COLOURS, SHAPES, render, scenes

SIDE = 64  # pixels
TOKENS = 12  # T5
SAVE_EVERY = 250  # steps
AVERAGE_EVERY = 10  # steps
WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMER = {
    "num_layers": 2,
    "num_single_layers": 5,
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "axes_dims_rope": [8, 12, 12],
    "joint_attention_dim": 96,
    "pooled_projection_dim": 96,
}
CLIP = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "projection_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
T5 = {"d_model": 96, "d_kv": 24, "d_ff": 192, "num_layers": 2, "num_heads": 4}


def make_pipeline(out: Path, vae: Path) -> None:
    """Writes the pipeline with random weights, the trained VAE, and tokenizers that know every word of the captions."""
    captions = [
        f"a {colour} {shape} on a {other} background" for colour in COLOURS for shape in SHAPES for other in COLOURS
    ]
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_flux(partial, captions=CAPTIONS + captions, transformer=TRANSFORMER, clip=CLIP, t5=T5)
    shutil.copyfile(vae / "config.json", partial / "vae" / "config.json")
    half = {name: value.astype(np.float16) for name, value in load_file(vae / WEIGHTS).items()}
    (partial / "vae" / WEIGHTS).write_bytes(save(half, metadata={"format": "pt"}))
    partial.rename(out)


def make_data(root: Path, path: Path) -> dict[str, np.ndarray]:
    """The VAE moments and token ids of every scene of the training split, computed once and kept in the file `path`."""
    if not path.is_file():
        vae = loading.load_model(root, "vae", precision.resolve_precision("no"))
        tokenizers = tokenization.load_tokenizer(root / "tokenizer"), tokenization.load_tokenizer(root / "tokenizer_2")
        all_scenes = scenes("train")
        moments = []
        for start in range(0, len(all_scenes), 64):
            images = [np.asarray(render(scene, SIDE), np.float32) for scene in all_scenes[start : start + 64]]
            moments.append(
                vae.encode(ms.Tensor(np.stack(images).transpose(0, 3, 1, 2) / 127.5 - 1))[0]
                .asnumpy()
                .astype(np.float16)
            )
        data = {
            "moments": np.concatenate(moments),
            "clip": np.array([token_ids(tokenizers[0], scene.caption, 77) for scene in all_scenes], np.int32),
            "t5": np.array([token_ids(tokenizers[1], scene.caption, TOKENS) for scene in all_scenes], np.int32),
        }
        files.write_atomically(path, lambda beside: np.savez(open(beside, "wb"), **data))  # noqa: SIM115
        print(f"encoded {len(all_scenes)} scenes", flush=True)
    return dict(np.load(path))


def make_batch(data: dict, ids: list[int], draws: np.random.Generator, sigma_count: int) -> tuple[np.ndarray, ...]:
    """The inputs of `PretrainStep` for the scenes `ids`: noise and sigma indices come from `draws`."""
    u = [flow.sample_density(draws, "logit_normal", 0.0, 1.0, 0.0) for _ in ids]
    indices = np.array([flow.density_to_index(value, sigma_count) for value in u], np.int32)
    shape = (len(ids), 16, SIDE // 8, SIDE // 8)
    posterior_noise = draws.standard_normal(shape, dtype=np.float32)
    noise = draws.standard_normal(shape, dtype=np.float32)
    moments = data["moments"][ids].astype(np.float32)
    return moments, posterior_noise, noise, indices, data["clip"][ids], data["t5"][ids]


class PretrainStep(library.TrainStep):
    """One update of transformer, CLIP and T5. Inputs: moments, posterior noise, noise, indices, CLIP ids, T5 ids."""

    def __init__(self, transformer, clip, t5, optimizer, latent_config, sigmas):
        super().__init__(transformer, optimizer, gradient_accumulation_steps=1)
        self.grad_clipper = precision.GradNormClipper(1.0)
        self.clip = clip.set_grad()
        self.t5 = t5.set_grad()
        self.shift, self.scale = flow.scale_constants(latent_config)
        self.sigmas = ms.Tensor(sigmas)
        self.text_ids = ms.Tensor(np.zeros((TOKENS, 3), np.float32))
        self.image_ids = ms.Tensor(flow.latent_image_ids(SIDE // 8, SIDE // 8))

    def forward(self, moments, posterior_noise, noise, indices, clip_ids, t5_ids):
        latents = (flow.sample_posterior(moments, posterior_noise) - self.shift) * self.scale
        sigmas = flow.get_sigmas(self.sigmas, indices)
        prediction = self.model(
            hidden_states=flow.pack_latents(sigmas * noise + (1.0 - sigmas) * latents),
            timestep=sigmas.reshape((-1,)),
            guidance=ops.full((noise.shape[0],), 3.5, dtype=ms.float32),
            pooled_projections=self.clip(clip_ids)[1],
            encoder_hidden_states=self.t5(t5_ids)[0],
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]
        prediction = flow.unpack_latents(prediction, noise.shape[2], noise.shape[3])
        loss = flow.sample_losses(prediction, noise - latents, ops.ones_like(sigmas)).mean()
        return self.scale_loss(loss), loss


def write_weights(root: Path, cells: dict[str, nn.Cell], average: dict[str, np.ndarray]) -> None:
    """Writes the averaged weights to the files of the pipeline, in fp16, under the names in the files."""
    for part in cells:
        path = weight_files(root, part)[0]
        names = sorted(load_file(path))
        ours = {
            named_parameters.hf_name(name[len(part) + 1 :]): value
            for name, value in average.items()
            if name.startswith(f"{part}.")
        }
        if missing := set(names) - set(ours):
            raise KeyError(f"{part}: no trained weight for {sorted(missing)[:3]}")
        half = {name: ours[name].astype(np.float16) for name in names}
        files.write_atomically(
            path, lambda beside, half=half: beside.write_bytes(save(half, metadata={"format": "pt"}))
        )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("work", metavar="WORK", type=Path, help="Directory with vae/; results are written there.")
    add("--steps", type=int, default=8000, help="Total updates; the learning rate decays to 0. Default: 8000.")
    add("--batch_size", type=int, default=32, help="Images per update. Default: 32.")
    add("--learning_rate", type=float, default=1e-3, help="Peak learning rate. Default: 1e-3.")
    add("--seed", type=int, default=0, help="Seed of all random draws. Default: 0.")
    args = parser.parse_args(argv)

    # ---- pipeline, data --------------------------------------------------------------------------
    execution.set_up_device(graph_mode=False)
    root = args.work / "flux-shapes"
    if not root.exists():
        make_pipeline(root, args.work / "vae")
    data = make_data(root, args.work / "data.npz")
    execution.set_up_device(graph_mode=True)

    # ---- models, step ----------------------------------------------------------------------------
    full = precision.resolve_precision("no")
    # In evaluation mode although they train: T5's dropout draws from a generator whose state cannot be saved.
    cells = {name: loading.load_model(root, name, full) for name in ("transformer", "text_encoder", "text_encoder_2")}
    parameters = {f"{part}.{name}": p for part, cell in cells.items() for name, p in cell.parameters_and_names()}
    for parameter in parameters.values():
        parameter.requires_grad = True
    print(precision.parameter_table(cells, full), flush=True)
    trained = [p for cell in cells.values() for p in cell.trainable_params()]
    groups = [{"params": trained, "lr": args.learning_rate, "weight_decay": 0.01}]
    optimizer = optimizers.create_optimizer(optimizers.Settings(adam_beta2=0.99), groups)
    schedule = schedules.Schedule(args.learning_rate, args.steps, "cosine", lr_warmup_steps=300)
    # Shifted towards noise, where colours, position and shape are decided; low noise levels are details of the VAE.
    sigmas = flow.shift_sigmas(loading.load_scheduler(root).sigmas.asnumpy(), 2.5)
    step = PretrainStep(*cells.values(), optimizer, configs.read_config(root, "vae"), sigmas)
    ema = averaging.EMA(list(parameters.values()), 0.9995)
    averages = dict(zip(parameters, ema.averages))

    # ---- resume ----------------------------------------------------------------------------------
    states = args.work / "state"
    first = 0
    state = {**parameters, **{f"average.{name}": p for name, p in averages.items()}}
    state.update({f"optimizer.{k}": p for k, p in optimizers.optimizer_state(optimizer).items()})
    if folder := checkpoint.find_checkpoint(states, "latest"):
        checkpoint.load_state(folder / "state.safetensors", state)
        first = checkpoint.step_of(folder)
        print(f"resuming after step {first}", flush=True)

    def save(number):
        checkpoint.save_checkpoint(
            states, number, lambda folder: checkpoint.save_state(folder / "state.safetensors", state), 2
        )
        write_weights(root, cells, {name: p.asnumpy() for name, p in averages.items()})

    # ---- train -----------------------------------------------------------------------------------
    stream = rng.SampleStream(args.seed, "pretrain", len(data["t5"]))
    started = time.time()
    losses = []
    for number in range(first, args.steps):
        ids = [stream.at(k)[0] for k in range(number * args.batch_size, (number + 1) * args.batch_size)]
        batch = make_batch(data, ids, rng.generator(args.seed, "pretrain draws", number), len(sigmas))
        optimizers.set_learning_rates(optimizer, [schedule.rate(number)])
        losses.append(float(step(*map(ms.Tensor, batch))[1]))
        done = number + 1
        if done % AVERAGE_EVERY == 0:
            ema.update(done, AVERAGE_EVERY)
        if done % 50 == 0:
            pace = (time.time() - started) / (done - first)
            print(f"step {done}: loss {np.mean(losses[-50:]):.4f}, {pace:.2f} s per step", flush=True)
        if done % SAVE_EVERY == 0 or done == args.steps:
            save(done)
    print(json.dumps({"steps": args.steps, "loss": float(np.mean(losses[-250:])) if losses else None}))


if __name__ == "__main__":
    main()
