"""Is memory given back? The training process's own memory around the encode stage and around every validation, and over a long run.

    python benchmarks/memory_back.py [rounds] [leak]            about half an hour on two cores

rounds: each script trains with cached text and latents and looks three times, on a tiny pipeline whose VAE is as large as FLUX.1-dev's
(335 MB in float32; it is loaded to draw). RssAnon of the process, from /proc: memory that only it has, without mapped files.
leak: 500 updates, validation and a checkpoint every 50, on the tiny pipeline; RssAnon after each checkpoint. Linux only.
Writes benchmarks/results/memory_back.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [
    str(ROOT / folder)
    for folder in ("benchmarks", "examples/tiny", "examples/controlnet", "flux_lora", "flux_controlnet")
]

from loading import status

SCRIPTS = {"lora": "train_dreambooth_lora_flux", "controlnet": "train_controlnet_flux", "sd": "train_controlnet"}
VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32}


def flags(kind, work, updates, every):
    """The command line of a run that looks and saves every so many updates."""
    words = [
        "--pretrained_model_name_or_path",
        work / ("sd15" if kind == "sd" else "flux"),
        "--resolution",
        64,
        "--cache_latents",
    ]
    words += [
        "--train_batch_size",
        2,
        "--max_train_steps",
        updates,
        "--num_validation_images",
        1,
        "--num_inference_steps",
        4,
        "--seed",
        0,
    ]
    words += [
        "--checkpointing_steps",
        every,
        "--checkpoints_total_limit",
        1,
        "--cache_dir",
        work / "cache",
        "--validation_split",
        0.25,
    ]
    words += ["--validation_prompt", "a red circle"]
    if kind == "lora":
        # Four pictures of eight uses: an epoch is three pictures and so three halves of an update.
        return [*words, "--instance_data_dir", work / "pairs" / "images", "--instance_prompt", "a circle", "--repeats", 2 * every // 3,
                "--validation_epochs", 1, "--max_sequence_length", 16]  # fmt: skip
    words += ["--train_data_dir", work / "pairs", "--validation_image", work / "pairs" / "conditioning" / "000000.png"]
    words += ["--validation_steps", every]
    if kind == "controlnet":
        words += ["--num_double_layers", 1, "--num_single_layers", 1, "--max_sequence_length", 16]
    return words


def run(kind, mode, work, updates, every):
    """In a process of its own: a run of a script with a watch on its memory. Prints JSON: what, RssAnon in MB."""
    import importlib

    from mindtune.encode import encoder_stage

    script, notes = importlib.import_module(SCRIPTS[kind]), []

    def note(what):
        notes.append((what, status()["RssAnon"]))

    def watched(owner, name, what):
        real = getattr(owner, name)

        def call(*words, **more):
            note(f"before {what}")
            out = real(*words, **more)
            note(f"after {what}")
            return out

        setattr(owner, name, call)

    watched(encoder_stage.EncoderStage, "prepare", "the encode stage")
    watched(script.Painter, "rows" if kind == "lora" else "draw", "drawing")
    watched(script.checkpoint, "save_checkpoint", "saving")
    watched(script.execution, "free_memory", "giving back")
    words = [str(word) for word in flags(kind, work, updates, every)]
    script.main(
        [
            *words,
            "--output_dir",
            str(work / f"out-{kind}-{mode}"),
            "--mindspore_mode",
            str(mode),
            "--overwrite_output_dir",
        ]
    )
    print(json.dumps(notes))


def watch(kind, mode, work, updates, every):
    command = [sys.executable, __file__, "--run", kind, str(mode), str(work), str(updates), str(every)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def make(work, heavy):
    from make_tiny_pipeline import make_flux, make_sd15
    from shapes import make_folder

    make_flux(work / "flux", **({"vae": VAE} if heavy else {}))
    make_sd15(work / "sd15")
    make_folder(work / "pairs", 4, 64, seed=0, split="train")


def rounds(work):
    make(work, heavy=True)
    found = {}
    print("memory of the training process, MB: around the encode stage, then around each validation (growth in %)")
    for kind in SCRIPTS:
        for mode in (0, 1):
            notes = watch(kind, mode, work, 12, 3)
            notes = [(what, memory) for what, memory in notes if "saving" not in what and "giving" not in what]
            starts = [i for i, (what, _) in enumerate(notes) if what.startswith("before")]
            pairs = [(notes[i][1], notes[i + 1][1]) for i in starts]
            found[f"{kind} {('graph', 'PyNative')[mode]}"] = pairs
            shown = "   ".join(f"{a:5.0f} -> {b:5.0f} ({100 * (b / a - 1):+.1f}%)" for a, b in pairs)
            print(f"{kind:10s} {('graph', 'PyNative')[mode]:8s} {shown}", flush=True)
    return found


def leak(work):
    make(work, heavy=False)
    found = {}
    print("memory of the training process after every 50 of 500 updates, MB, and its growth after the first 100")
    for kind in ("lora", "controlnet"):
        for mode in (0, 1):
            notes = watch(kind, mode, work, 500, 50)
            before = [what for what, _ in notes]
            after = [
                memory
                for i, (what, memory) in enumerate(notes)
                if what == "after giving back" and before[i - 2] == "after saving"
            ]
            found[f"{kind} {('graph', 'PyNative')[mode]}"] = after
            growth = max(after[2:]) / after[1] - 1
            print(
                f"{kind:10s} {('graph', 'PyNative')[mode]:8s} {' '.join(f'{m:5.0f}' for m in after)}   {100 * growth:+.2f}%",
                flush=True,
            )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="*", default=["rounds", "leak"], help="rounds, leak; default: both.")
    parser.add_argument("--run", nargs=5, metavar=("KIND", "MODE", "WORK", "UPDATES", "EVERY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        kind, mode, work, updates, every = args.run
        return run(kind, int(mode), Path(work), int(updates), int(every))
    path = ROOT / "benchmarks" / "results" / "memory_back.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    for what in args.what:
        with tempfile.TemporaryDirectory() as folder:
            kept[what] = {"date": time.strftime("%Y-%m-%d"), **{"rounds": rounds, "leak": leak}[what](Path(folder))}
        path.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
