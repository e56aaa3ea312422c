"""Our side of the interchange check: files of our training scripts in diffusers, diffusers' and peft's in our scripts."""

import json
import shutil

import numpy as np
from cases import CAPTION, Case, make_pipeline, scene
from PIL import Image
from safetensors.numpy import load_file

# `cases` has made the scripts' folders known.
# isort: split
import export_flux_lora
import infer_controlnet
import infer_controlnet_sdxl
import infer_flux_controlnet
import infer_flux_lora
import train_controlnet
import train_controlnet_flux
import train_controlnet_sdxl
import train_dreambooth_lora_flux
from shapes import conditioning, make_folder, make_subject

from mindtune import rng
from mindtune.models import configs, lora_files

SCRIPTS = {
    "flux_lora": (train_dreambooth_lora_flux, infer_flux_lora), "flux_controlnet": (train_controlnet_flux, infer_flux_controlnet),
    "sd15": (train_controlnet, infer_controlnet), "sdxl": (train_controlnet_sdxl, infer_controlnet_sdxl),
}  # fmt: skip
NAMES = {
    "flux_lora": "LoRA with CLIP's part",
    "flux_controlnet": "FLUX ControlNet",
    "sd15": "SD 1.5 ControlNet",
    "sdxl": "SDXL ControlNet",
}
LENGTH = 16
# Every kind of linear layer that a FLUX LoRA may adapt.
LAYERS = "to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out,net.0.proj,net.2,norm1.linear,norm1_context.linear"
LAYERS += ",norm.linear,proj_mlp,proj_out,x_embedder,context_embedder,norm_out.linear,linear_1,linear_2"
MORE = {
    "flux_lora": ("--lora_rank=4", "--lora_alpha=8", f"--lora_layers={LAYERS}"),
    "flux_controlnet": ("--num_double_layers=2", "--num_single_layers=1"),
}


def train(folder, kind, root, data, out, rate, updates, *more):
    """The training script as a user runs it, in this process."""
    flags = {
        "pretrained_model_name_or_path": root,
        "output_dir": folder / out,
        "cache_dir": folder.parent / "cache",
        "resolution": 64,
    }
    flags.update(
        max_train_steps=updates, learning_rate=rate, train_batch_size=1, seed=0, mindspore_mode=1, report_to="none"
    )
    flags["instance_data_dir" if kind == "flux_lora" else "train_data_dir"] = data[kind == "flux_lora"]
    if kind.startswith("flux"):
        flags["max_sequence_length"] = LENGTH
    if kind == "flux_lora":
        flags.update(instance_prompt="x", text_encoder_lr=rate)
        more = ("--train_text_encoder", "--upcast_before_saving", *more)
    assert (
        SCRIPTS[kind][0].main([*(f"--{name}={value}" for name, value in flags.items()), "--cache_latents", *more]) == 0
    )


def draw(folder, kind, root, what):
    """The inference script's picture, uint8 [H, W, 3], of `what`: a LoRA or ControlNet; None: without a LoRA, a ControlNet's strength 0."""
    output = folder / f"{what.stem if what else 'base'}.png"
    flags = [
        "--pretrained_model_name_or_path",
        root,
        "--prompt",
        CAPTION,
        "--num_inference_steps",
        8,
        "--output",
        output,
    ]
    flags += ["--max_sequence_length", LENGTH] if kind.startswith("flux") else ["--guidance_scale", 5.0]
    if kind == "flux_lora":
        flags += ["--height", 64, "--width", 96, *(["--lora", what] if what else [])]
    else:
        flags += [
            "--resolution",
            64,
            "--control_image",
            folder / "condition.png",
            "--controlnet",
            what or folder / "ours",
        ]
        flags += [] if what else ["--controlnet_conditioning_scale", 0.0]
    assert SCRIPTS[kind][1].main(list(map(str, flags))) == 0
    return np.asarray(Image.open(output)).astype(float)


def prepare(work):
    """Trains each script for a few updates and leaves what the references read in `work`; gives each kind's pipeline and the data."""
    data, roots = (work / "pairs", work / "subject"), {}
    make_folder(data[0], 4, 80, seed=0, split="train")
    make_subject(data[1], 80)
    for kind in SCRIPTS:
        folder = work / kind
        folder.mkdir()
        root = roots[kind] = make_pipeline(
            Case(kind, "", {"prediction_type": "epsilon"} if kind.startswith("sd") else {}), work
        )
        settings = {"kind": kind, "root": str(root), "caption": CAPTION, "length": LENGTH}
        (folder / "settings.json").write_text(json.dumps(settings))
        channels = configs.read_config(root, "vae")["latent_channels"]
        np.save(folder / "noise.npy", rng.normal(0, "validation", 0, shape=(1, channels, 8, 12)))
        conditioning(scene(0, 0), 96).convert("RGB").resize((96, 64)).save(folder / "condition.png")
        train(folder, kind, root, data, "ours", 0.05, 3, *MORE.get(kind, ()))
    layouts, adapter = work / "layouts", work / "flux_lora" / "ours" / lora_files.LORA_FILE
    layouts.mkdir()
    (layouts / "pipeline").symlink_to(roots["flux_lora"])
    shutil.copy(adapter, layouts / "adapter.safetensors")
    for layout in ("kohya", "comfyui"):
        assert (
            export_flux_lora.main(
                ["--lora", str(adapter), "--format", layout, "--output", str(layouts / f"{layout}.safetensors")]
            )
            == 0
        )
    return roots, data


def weight_changes(path):
    """Layer -> B A alpha / rank of a LoRA file."""
    tensors, alphas = lora_files.read_lora(path, "--lora")
    changes = {}
    for layer in {name.rpartition(".lora_")[0] for name in tensors}:
        a, b = (tensors[f"{layer}.lora_{half}.weight"].astype(np.float64) for half in "AB")
        changes[layer] = b @ a * alphas.get(layer, len(a)) / len(a)
    return changes


def compare(work, roots, data):
    """Rows of (what, number found, its bound, the number that would show that nothing was loaded, where there is one)."""
    found, rows = np.load(work / "found.npz"), []
    for kind, root in roots.items():
        folder, name = work / kind, NAMES[kind]
        base = draw(folder, kind, root, None)
        pictures = {source: draw(folder, kind, root, folder / source) for source in ("ours", "theirs")}
        apart = {source: np.abs(picture - found[f"{kind} {source}"]).mean() for source, picture in pictures.items()}
        effect = {source: np.abs(picture - base).mean() for source, picture in pictures.items()}
        rows.append((f"{name} of ours in diffusers: keys missing or in excess", int(found[f"{kind} keys"]), 0, None))
        rows.append((f"{name} of ours in diffusers: pictures apart, of 255", apart["ours"], 1.0, effect["ours"]))
        rows.append((f"{name} of diffusers in ours: pictures apart, of 255", apart["theirs"], 1.0, effect["theirs"]))

        flag = "--lora_model_name_or_path" if kind == "flux_lora" else "--controlnet_model_name_or_path"
        read = weight_changes if kind == "flux_lora" else load_file
        file = lora_files.LORA_FILE if kind == "flux_lora" else "diffusion_pytorch_model.safetensors"
        for out, rate in (("resting", 0.0), ("moved", 1e-3)):
            train(folder, kind, root, data, out, rate, 1, f"{flag}={folder / 'theirs'}")
        before, resting, moved = (read(folder / out / file) for out in ("theirs", "resting", "moved"))
        assert before.keys() == resting.keys() == moved.keys()
        gaps = [
            max(np.abs(after[k] - v).max() / np.abs(v).max() for k, v in before.items()) for after in (resting, moved)
        ]
        rows.append(
            (f"{name} of diffusers gone on from at rate 0: change of a weight, relative", gaps[0], 1e-6, gaps[1])
        )
        if kind == "flux_lora":
            for layout in ("kohya", "comfyui"):
                exported = draw(folder, kind, root, work / "layouts" / f"{layout}.safetensors")
                gap = np.abs(exported - pictures["ours"]).mean()
                rows.append((f"LoRA exported for {layout} in ours: pictures apart, of 255", gap, 1.0, effect["ours"]))
    for what, error in json.loads((work / "layouts" / "layouts.json").read_text()).items():
        rows.append((f"LoRA in diffusers' converters: {what}: change of a weight, relative", error, 1e-5, None))
    return rows
