"""Our side of the interchange check: our files in diffusers, and files of diffusers and peft in our scripts."""

import json
import shutil

import numpy as np
from cases import CAPTION, Case, make_pipeline, scene
from PIL import Image
from safetensors.numpy import load_file

# `cases` has put the folders of the scripts on the path.
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
from shapes import make_folder, make_subject, render_outline

from mindtune import rng
from mindtune.models import configs, lora_files

SCRIPTS = {
    "flux_lora": (train_dreambooth_lora_flux, infer_flux_lora),
    "flux_controlnet": (train_controlnet_flux, infer_flux_controlnet),
    "sd15": (train_controlnet, infer_controlnet),
    "sdxl": (train_controlnet_sdxl, infer_controlnet_sdxl),
}
NAMES = {
    "flux_lora": "LoRA with CLIP's part",
    "flux_controlnet": "FLUX ControlNet",
    "sd15": "SD 1.5 ControlNet",
    "sdxl": "SDXL ControlNet",
}
ADAPTERS = {"dora": "DoRA with CLIP's part", "lokr": "LoKr with CLIP's part"}
LENGTH = 16
# Every kind of linear layer that a FLUX LoRA can adapt.
LAYERS = "to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out,net.0.proj,net.2"
LAYERS += ",norm1.linear,norm1_context.linear,norm.linear,proj_mlp,proj_out"
LAYERS += ",x_embedder,context_embedder,norm_out.linear,linear_1,linear_2"
MORE = {
    "flux_lora": ("--lora_rank=4", "--lora_alpha=8", f"--lora_layers={LAYERS}"),
    "flux_controlnet": ("--num_double_layers=2", "--num_single_layers=1"),
}


def train(folder, kind, root, data, out, rate, updates, *more):
    """Runs the training script in this process."""
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
    words = [f"--{name}={value}" for name, value in flags.items()]
    assert SCRIPTS[kind][0].main([*words, "--cache_latents", *more]) == 0


def infer(folder, kind, root, adapter):
    """The image of the inference script with a LoRA or ControlNet (None: the base model alone), [H, W, 3], 0 to 255."""
    output = folder / f"{adapter.stem if adapter else 'base'}.png"
    flags = ["--pretrained_model_name_or_path", root, "--prompt", CAPTION]
    flags += ["--num_inference_steps", 8, "--output", output]
    flags += ["--max_sequence_length", LENGTH] if kind.startswith("flux") else ["--guidance_scale", 5.0]
    if kind == "flux_lora":
        flags += ["--height", 64, "--width", 96, *(["--lora", adapter] if adapter else [])]
    else:
        flags += ["--resolution", 64, "--control_image", folder / "condition.png"]
        flags += ["--controlnet", adapter or folder / "ours"]
        flags += [] if adapter else ["--controlnet_conditioning_scale", 0.0]
    assert SCRIPTS[kind][1].main(list(map(str, flags))) == 0
    return np.asarray(Image.open(output)).astype(float)


def prepare(work):
    """Trains each script for a few updates and writes the references' inputs; (kind -> pipeline, data folders)."""
    data = (work / "pairs", work / "subject")
    roots = {}
    make_folder(data[0], 4, 80, seed=0, split="train")
    make_subject(data[1], 80)
    for kind in SCRIPTS:
        folder = work / kind
        folder.mkdir()
        case_settings = {"prediction_type": "epsilon"} if kind.startswith("sd") else {}
        root = make_pipeline(Case(kind, "", case_settings), work)
        roots[kind] = root
        settings = {"kind": kind, "root": str(root), "caption": CAPTION, "length": LENGTH}
        (folder / "settings.json").write_text(json.dumps(settings))
        channels = configs.read_config(root, "vae")["latent_channels"]
        np.save(folder / "noise.npy", rng.normal(0, "validation", 0, shape=(1, channels, 8, 12)))
        render_outline(scene(0, 0), 96).convert("RGB").resize((96, 64)).save(folder / "condition.png")
        train(folder, kind, root, data, "ours", 0.05, 3, *MORE.get(kind, ()))
    for adapter in ADAPTERS:
        more = (*MORE["flux_lora"], f"--adapter={adapter}")
        train(work / "flux_lora", "flux_lora", roots["flux_lora"], data, f"ours_{adapter}", 0.05, 3, *more)
    layouts = work / "layouts"
    adapter = work / "flux_lora" / "ours" / lora_files.LORA_FILE
    layouts.mkdir()
    (layouts / "pipeline").symlink_to(roots["flux_lora"])
    shutil.copy(adapter, layouts / "adapter.safetensors")
    for layout in ("kohya", "comfyui"):
        words = ["--lora", adapter, "--format", layout, "--output", layouts / f"{layout}.safetensors"]
        assert export_flux_lora.main([str(word) for word in words]) == 0
    return roots, data


def weight_changes(path):
    """Layer -> the weight change B A alpha / rank of a LoRA file."""
    tensors, alphas = lora_files.read_lora(path, "--lora")
    changes = {}
    for layer in {name.rpartition(".lora_")[0] for name in tensors}:
        a, b = (tensors[f"{layer}.lora_{half}.weight"].astype(np.float64) for half in "AB")
        changes[layer] = b @ a * alphas.get(layer, len(a)) / len(a)
    return changes


def compare_adapters(folder, root, found, base):
    """The rows of `compare` for DoRA and LoKr. peft has a LoKr, but diffusers reads none."""
    rows = []
    for adapter, name in ADAPTERS.items():
        tool = "diffusers" if adapter == "dora" else "peft"
        rows.append(
            (f"{name} of ours in {tool}: missing or unexpected keys", int(found[f"flux_lora keys_{adapter}"]), 0, None)
        )
        for source in ("ours", "theirs") if adapter == "dora" else ("ours",):
            image = infer(folder, "flux_lora", root, folder / f"{source}_{adapter}")
            error = np.abs(image - found[f"flux_lora {source}_{adapter}"]).mean()
            where = f"ours in {tool}" if source == "ours" else f"{tool} in ours"
            rows.append((f"{name} of {where}: difference of images, of 255", error, 1.0, np.abs(image - base).mean()))
    return rows


def compare(work, roots, data):
    """Rows of (what, value, its bound, the value if the file were not loaded or were trained, or None)."""
    found = np.load(work / "found.npz")
    rows = []
    for kind, root in roots.items():
        folder = work / kind
        name = NAMES[kind]
        base = infer(folder, kind, root, None)
        images = {source: infer(folder, kind, root, folder / source) for source in ("ours", "theirs")}
        error = {source: np.abs(image - found[f"{kind} {source}"]).mean() for source, image in images.items()}
        effect = {source: np.abs(image - base).mean() for source, image in images.items()}
        rows.append((f"{name} of ours in diffusers: missing or unexpected keys", int(found[f"{kind} keys"]), 0, None))
        rows.append((f"{name} of ours in diffusers: difference of images, of 255", error["ours"], 1.0, effect["ours"]))
        rows.append(
            (f"{name} of diffusers in ours: difference of images, of 255", error["theirs"], 1.0, effect["theirs"])
        )

        flag = "--lora_model_name_or_path" if kind == "flux_lora" else "--controlnet_model_name_or_path"
        read = weight_changes if kind == "flux_lora" else load_file
        file = lora_files.LORA_FILE if kind == "flux_lora" else "diffusion_pytorch_model.safetensors"
        for out, rate in (("unchanged", 0.0), ("moved", 1e-3)):
            train(folder, kind, root, data, out, rate, 1, f"{flag}={folder / 'theirs'}")
        before, unchanged, moved = (read(folder / out / file) for out in ("theirs", "unchanged", "moved"))
        assert before.keys() == unchanged.keys() == moved.keys()
        gaps = [
            max(np.abs(after[k] - v).max() / np.abs(v).max() for k, v in before.items()) for after in (unchanged, moved)
        ]
        rows.append(
            (f"{name} of diffusers trained at learning rate 0: relative change of a weight", gaps[0], 1e-6, gaps[1])
        )
        if kind == "flux_lora":
            rows += compare_adapters(folder, root, found, base)
            for layout in ("kohya", "comfyui"):
                exported = infer(folder, kind, root, work / "layouts" / f"{layout}.safetensors")
                gap = np.abs(exported - images["ours"]).mean()
                rows.append(
                    (f"LoRA exported for {layout} in ours: difference of images, of 255", gap, 1.0, effect["ours"])
                )
    for what, error in json.loads((work / "layouts" / "layouts.json").read_text()).items():
        rows.append((f"LoRA in diffusers' converters: {what}: relative error of a weight change", error, 1e-5, None))
    return rows
