"""Whether memory is freed: the training process's memory around encoding and validation, and over a long run.

    python benchmarks/memory_back.py [rounds] [leak]

Expect half an hour on two cores. Linux only. Memory is the RssAnon of the process, which leaves out mapped files.
Writes benchmarks/results/memory_back.json.

rounds: each script trains with cached text and latents and validates three times, on a tiny pipeline with the VAE of
FLUX.1-dev (335 MB in float32), which is loaded for validation.

leak: 500 updates on the tiny pipeline, with validation and a checkpoint every 50; memory after each checkpoint.
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
MODES = ("graph", "PyNative")
VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32}


def flags(script, work, updates, every):
    """The command line of a run that validates and saves every `every` updates."""
    words = ["--pretrained_model_name_or_path", work / ("sd15" if script == "sd" else "flux"), "--resolution", 64]
    words += ["--cache_latents", "--train_batch_size", 2, "--max_train_steps", updates, "--num_validation_images", 1]
    words += ["--num_inference_steps", 4, "--seed", 0, "--checkpointing_steps", every]
    words += ["--checkpoints_total_limit", 1, "--cache_dir", work / "cache", "--validation_split", 0.25]
    words += ["--validation_prompt", "a red circle"]
    if script == "lora":
        # An epoch is three images, each repeated 2 * every // 3 times: `every` updates of batch 2.
        words += ["--instance_data_dir", work / "pairs" / "images", "--instance_prompt", "a circle"]
        return [*words, "--repeats", 2 * every // 3, "--validation_epochs", 1, "--max_sequence_length", 16]
    words += ["--train_data_dir", work / "pairs", "--validation_image", work / "pairs" / "conditioning" / "000000.png"]
    words += ["--validation_steps", every]
    if script == "controlnet":
        words += ["--num_double_layers", 1, "--num_single_layers", 1, "--max_sequence_length", 16]
    return words


def run(kind, mode, work, updates, every):
    """One training run, in a process of its own. Prints [what, RssAnon in MB] before and after each stage as JSON."""
    import importlib

    from mindtune.encode import encoder_stage
    from mindtune.run import checkpoint, record

    script = importlib.import_module(SCRIPTS[kind])
    notes = []

    def note(what):
        notes.append((what, status()["RssAnon"]))

    def watch_calls(owner, name, what):
        real = getattr(owner, name)

        def call(*words, **more):
            note(f"before {what}")
            out = real(*words, **more)
            note(f"after {what}")
            return out

        setattr(owner, name, call)

    watch_calls(encoder_stage.EncoderStage, "prepare", "encoding")
    watch_calls(script.ValidationSampler, "sample", "validation")
    watch_calls(checkpoint, "save_checkpoint", "saving")
    watch_calls(record, "free_memory", "freeing")
    words = [*flags(kind, work, updates, every), "--output_dir", work / f"out-{kind}-{mode}"]
    words += ["--mindspore_mode", mode, "--overwrite_output_dir"]
    script.main([str(word) for word in words])
    print(json.dumps(notes))


def measure(kind, mode, work, updates, every):
    """`run` in a process of its own; what it prints."""
    command = [sys.executable, __file__, "--run", kind, str(mode), str(work), str(updates), str(every)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def make(work, heavy):
    """Writes the pipelines, with the VAE of FLUX.1-dev if `heavy`, and four pairs."""
    from make_tiny_pipeline import make_flux, make_sd15
    from shapes import make_folder

    make_flux(work / "flux", **({"vae": VAE} if heavy else {}))
    make_sd15(work / "sd15")
    make_folder(work / "pairs", 4, 64, seed=0, split="train")


def rounds(work):
    """Script and mode -> (memory before, after) of encoding and of each validation."""
    make(work, heavy=True)
    found = {}
    print("memory of the training process, MB: around encoding, then around each validation (growth in %)")
    for kind in SCRIPTS:
        for mode in (0, 1):
            notes = measure(kind, mode, work, 12, 3)
            notes = [(what, memory) for what, memory in notes if "saving" not in what and "freeing" not in what]
            starts = [i for i, (what, _) in enumerate(notes) if what.startswith("before")]
            pairs = [(notes[i][1], notes[i + 1][1]) for i in starts]
            found[f"{kind} {MODES[mode]}"] = pairs
            shown = "   ".join(f"{a:5.0f} -> {b:5.0f} ({100 * (b / a - 1):+.1f}%)" for a, b in pairs)
            print(f"{kind:10s} {MODES[mode]:8s} {shown}", flush=True)
    return found


def leak(work):
    """Script and mode -> memory after each checkpoint."""
    make(work, heavy=False)
    found = {}
    print("memory of the training process after every 50 of 500 updates, MB, and its growth after the first 100")
    for kind in ("lora", "controlnet"):
        for mode in (0, 1):
            notes = measure(kind, mode, work, 500, 50)
            names = [what for what, _ in notes]
            after = [
                memory
                for i, (what, memory) in enumerate(notes)
                if what == "after freeing" and names[i - 2] == "after saving"
            ]
            found[f"{kind} {MODES[mode]}"] = after
            growth = max(after[2:]) / after[1] - 1
            sizes = " ".join(f"{memory:5.0f}" for memory in after)
            print(f"{kind:10s} {MODES[mode]:8s} {sizes}   {100 * growth:+.2f}%", flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="*", default=["rounds", "leak"], help="rounds, leak. Default: both.")
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
