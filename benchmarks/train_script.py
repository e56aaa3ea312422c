"""One process of the speed benchmark that runs flux_lora/train_dreambooth_lora_flux.py or its encoder stage.

    python benchmarks/train_script.py JOB.json

speed.py starts it. The job `train` runs the script's main and measures its step and its waits for data, in one of these
forms:

    cached      with --cache_latents
    vae         without --cache_latents: the VAE runs inside the step
    seeds       the same, with mindone's modules
    seeds text  the same, with CLIP and T5 inside the step
"""

import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks", "examples/tiny", "flux_lora")]

import mindspore as ms
import numpy as np
import train_dreambooth_lora_flux as script
from mindspore import nn
from shapes import render, sample_scene
from step_mindspore import load_plainly, memory, require_plain, use_mindone_plainly

from mindtune.data import folders, image_data
from mindtune.encode import child, encoder_stage, text_encoders
from mindtune.models import execution, precision, tokenization

CALLS = []  # (start, end) of every call of the step, with reading its result
WAITS = []  # seconds waited for each batch


class WatchedStep(script.TrainStepForFluxDevDB):
    """The script's step; its result is read inside the call, as the script does after it."""

    def __call__(self, *batch):
        began = time.perf_counter()
        out = super().__call__(*batch)
        out[1].asnumpy()
        CALLS.append((began, time.perf_counter()))
        return out


def watch_data():
    """Records how long the training loop waits for each batch."""
    prefetch = image_data.prefetch

    def watched(*arguments, **options):
        batches = prefetch(*arguments, **options)
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            WAITS.append(time.perf_counter() - began)
            yield batch

    image_data.prefetch = watched


class WithText(nn.Cell):
    """A transformer whose text input is T5's token ids instead of its states."""

    def __init__(self, transformer, t5):
        super().__init__()
        self.transformer = transformer
        self.t5 = t5

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
        states = self.t5(encoder_hidden_states.astype(ms.int32))[0]
        return self.transformer(
            hidden_states=hidden_states,
            timestep=timestep,
            guidance=guidance,
            pooled_projections=pooled_projections,
            encoder_hidden_states=states,
            txt_ids=txt_ids,
            img_ids=img_ids,
            return_dict=return_dict,
        )


class PlainStep(WatchedStep):
    """The step with mindone's modules."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        for model in (self.transformer, self.vae):
            require_plain(model)


class StepWithText(PlainStep):
    """The step with frozen CLIP and T5 inside."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        root = ROOT / "examples/tiny/flux-shapes"
        clip, t5 = (load_plainly(root, name) for name in ("text_encoder", "text_encoder_2"))
        for encoder in (clip, t5):
            precision.freeze_params(encoder)
        self.text_encoder = clip
        self.transformer = WithText(self.transformer, t5)


def give_token_ids():
    """Batches hold token ids, computed for each use, instead of the outputs of T5 and CLIP."""
    root = ROOT / "examples/tiny/flux-shapes"
    clip, t5 = (tokenization.load_tokenizer(root / name) for name in ("tokenizer", "tokenizer_2"))

    def text(stage, caption):
        return {
            "prompt_embeds": text_encoders.token_ids(t5, caption, stage.max_sequence_length).astype(np.int32),
            "pooled_prompt_embeds": text_encoders.token_ids(clip, caption, clip.model_max_length).astype(np.int32),
        }

    encoder_stage.EncoderStage.text = text


def train(job):
    """Seconds per update, fraction outside the step, waits for data, and seconds to the first update."""
    if job["form"].startswith("seeds"):
        use_mindone_plainly()
    if job["form"] == "seeds text":
        give_token_ids()
    script.TrainStepForFluxDevDB = {"seeds": PlainStep, "seeds text": StepWithText}.get(job["form"], WatchedStep)
    watch_data()
    clocks = time.time() - time.perf_counter()
    flags = {
        "pretrained_model_name_or_path": job["root"],
        "instance_data_dir": job["images"],
        "output_dir": job["out"],
        "resolution": job["side"],
        "max_sequence_length": job["length"],
        "lora_rank": 16,
        "seed": 0,
        "report_to": "none",
        "train_batch_size": job["batch"],
        "max_train_steps": job["updates"],
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    script.main(words + job["flags"] + (["--cache_latents"] if job["form"] == "cached" else []))
    skipped = job["warmup"]
    ends = [end for _, end in CALLS]
    calls = [end - began for began, end in CALLS][skipped:]
    periods = np.diff(ends)[skipped - 1 :]
    return {
        "update": float(np.median(periods)),
        "in_step": float(np.median(calls)),
        "outside": 1.0 - sum(calls) / sum(periods),
        "images_per_second": job["batch"] / float(np.median(periods)),
        "first": ends[0] + clocks - job["started"],
        "first_wait": WAITS[0],
        "waited": sum(WAITS[1:]) / (ends[-1] - ends[0]),
        "late": sum(wait > 1e-3 for wait in WAITS[1:]),
        "batches": len(WAITS),
        "peak_mb": memory()["peak"],
    }


def encode_images(job):
    """Images per second of the encoder stage, with decoding and writing its entries, after the first `skip`."""
    execution.set_up_device(graph_mode=False)
    stage = encoder_stage.EncoderStage(Path(job["root"]), None, "no", Path(job["out"]), 12)
    samples = folders.samples_in_folder(job["images"], "images")[: job["count"]]
    put = stage.cache.put
    ends = []

    def watched_put(*arguments):
        put(*arguments)
        ends.append(time.perf_counter())

    stage.cache.put = watched_put
    child.encode_images(stage, [(sample, job["side"], False) for sample in samples])
    skipped = job["skip"]
    return {"images_per_second": (len(ends) - skipped) / (ends[-1] - ends[skipped - 1])}


def draw(job):
    """Writes `count` images of shapes with captions."""
    folder = Path(job["images"])
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(job["count"]):
        scene = sample_scene(rng, "train", anywhere=True)
        render(scene, job["side"]).save(folder / f"{number:06d}.png")
        (folder / f"{number:06d}.txt").write_text(scene.caption + "\n")
    return {}


def main(path):
    job = json.loads(Path(path).read_text())
    print(json.dumps({"train": train, "encode": encode_images, "draw": draw}[job["do"]](job)))


if __name__ == "__main__":
    main(sys.argv[1])
