"""Our side of the interchange check: our files in diffusers, and files of diffusers and peft in our scripts."""

import json
import shutil

import numpy as np
from cases import CAPTION, Case, make_pipeline, scene
from PIL import Image
from safetensors.numpy import load_file, save_file

# `cases` has put the folders of the scripts on the path.
# isort: split
import export_flux_lora
import infer_control_lora_flux
import infer_controlnet
import infer_controlnet_sdxl
import infer_flux_controlnet
import infer_flux_kontext
import infer_flux_lora
import train_control_lora_flux
import train_controlnet
import train_controlnet_flux
import train_controlnet_sdxl
import train_dreambooth_lora_flux
import train_lora_flux_kontext
from shapes import make_folder, make_subject, render, render_outline

from mindtune import rng
from mindtune.models import configs, flux_layer_names, lora_files, lora_layouts

SCRIPTS = {
    "flux_lora": (train_dreambooth_lora_flux, infer_flux_lora),
    "flux_kontext": (train_lora_flux_kontext, infer_flux_kontext),
    "flux_control": (train_control_lora_flux, infer_control_lora_flux),
    "flux_fill": (train_control_lora_flux, infer_control_lora_flux),
    "flux_controlnet": (train_controlnet_flux, infer_flux_controlnet),
    "sd15": (train_controlnet, infer_controlnet),
    "sdxl": (train_controlnet_sdxl, infer_controlnet_sdxl),
}
NAMES = {
    "flux_lora": "LoRA with CLIP's part",
    "flux_kontext": "Kontext LoRA",
    "flux_control": "Control-LoRA with norms",
    "flux_fill": "Control-LoRA with norms, --fill,",
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
RANK = ("--lora_rank=4", "--lora_alpha=8")
MORE = {
    "flux_lora": (*RANK, f"--lora_layers={LAYERS}"),
    **dict.fromkeys(("flux_kontext", "flux_control", "flux_fill"), RANK),
    "flux_controlnet": ("--num_double_layers=2", "--num_single_layers=1"),
}

# Flags that these kinds also need to go on from a file.
WITH_NORMS = ("--train_norm_layers",)
ALWAYS = {"flux_control": WITH_NORMS, "flux_fill": ("--fill", *WITH_NORMS)}


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
    flags += ["--max_sequence_length", LENGTH] if kind.startswith("flux") else []
    flags += ["--guidance_scale", 3.5 if kind.startswith("flux") else 5.0]
    if kind == "flux_lora":
        flags += ["--height", 64, "--width", 96, *(["--lora", adapter] if adapter else [])]
    elif kind in ("flux_kontext", "flux_control", "flux_fill"):
        flags += ["--lora", adapter or folder / "ours", *([] if adapter else ["--lora_scale", 0.0])]
        flags += ["--resolution", 64, "--image" if kind == "flux_kontext" else "--control_image"]
        flags += [folder / "condition.png"]
        flags += ["--fill", "--mask_image", folder / "mask.png"] if kind == "flux_fill" else []
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
        outline = render_outline(scene(0, 0), 96).resize((96, 64))
        outline.convert("L").save(folder / "mask.png")
        shown = render(scene(0, 0), 96).resize((96, 64)) if kind in ("flux_kontext", "flux_fill") else outline
        shown.convert("RGB").save(folder / "condition.png")
        train(folder, kind, root, data, "ours", 0.05, 3, *MORE.get(kind, ()), *ALWAYS.get(kind, ()))
    train(work / "flux_control", "flux_control", roots["flux_control"], data, "ours_plain", 0.05, 3, *RANK)
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
    save_file(native_control_lora(), layouts / "native_control.safetensors")
    return roots, data


def native_control_lora():
    """A Control-LoRA of FLUX.1's size with the names of FLUX.1-Depth-dev-lora: rank 2, biases of B, norms; float16.

    Widths are FLUX.1's only where its weights are divided.
    """
    tensors = {}

    def draw(name, *shape):
        tensors[name] = rng.normal(0, name, shape=shape).astype(np.float16)

    for native, layers in flux_layer_names.NATIVE_LAYERS.items():
        count = 1 if "#" not in native else 19 if native.startswith("double") else 38
        for number in range(count):
            name = native.replace("#", str(number))
            outputs = {3: 3 * 3072, 4: 7 * 3072}.get(len(layers), 512)
            draw(f"{name}.lora_A.weight", 2, 3072)
            draw(f"{name}.lora_B.weight", outputs, 2)
            draw(f"{name}.lora_B.bias", outputs)
    norms = [f"double_blocks.{n}.{stream}_attn.norm" for n in range(19) for stream in ("img", "txt")]
    for norm in (*norms, *(f"single_blocks.{n}.norm" for n in range(38))):
        for letter in ("query", "key"):
            draw(f"{norm}.{letter}_norm.scale", 128)
    return tensors


def native_error(folder):
    """The largest error of a value of `native_control_lora` as we read it, by the conversion of diffusers.

    diffusers 0.35.2 swaps the halves of norm_out's A too, which are not those of its outputs. That is undone.
    """
    tensors, _ = lora_files.read_lora(folder / "native_control.safetensors", "--lora", biases=True)
    expected = load_file(folder / "native_control_in_diffusers.safetensors")
    swapped = "transformer.norm_out.linear.lora_A.weight"
    expected[swapped] = expected[swapped][::-1]
    assert tensors.keys() == expected.keys(), tensors.keys() ^ expected.keys()
    assert all(tensors[name].shape == value.shape for name, value in expected.items())
    return max(np.abs(tensors[name].astype(np.float64) - value).max() for name, value in expected.items())


def weight_changes(path):
    """Layer -> the weight change B A alpha / rank of a LoRA file; and its norms."""
    tensors, alphas = lora_files.read_lora(path, "--lora")
    changes = lora_layouts.norms(tensors)
    for layer in {name.rpartition(".lora_")[0] for name in tensors.keys() - changes.keys()}:
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


def compare_control_loras(folder, root, found, base):
    """The rows of `compare` for a Control-LoRA of ours without norms, and one of diffusers with biases."""
    rows = []
    for source, what in (("ours_plain", "ours in diffusers"), ("theirs_bias", "diffusers with biases in ours")):
        image = infer(folder, "flux_control", root, folder / source)
        error = np.abs(image - found[f"flux_control {source}"]).mean()
        rows.append((f"Control-LoRA of {what}: difference of images, of 255", error, 1.0, np.abs(image - base).mean()))
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

        controlnet = kind in ("flux_controlnet", "sd15", "sdxl")
        flag = "--controlnet_model_name_or_path" if controlnet else "--lora_model_name_or_path"
        read = load_file if controlnet else weight_changes
        file = "diffusion_pytorch_model.safetensors" if controlnet else lora_files.LORA_FILE
        for out, rate in (("unchanged", 0.0), ("moved", 1e-3)):
            train(folder, kind, root, data, out, rate, 1, f"{flag}={folder / 'theirs'}", *ALWAYS.get(kind, ()))
        before, unchanged, moved = (read(folder / out / file) for out in ("theirs", "unchanged", "moved"))
        assert before.keys() == unchanged.keys() == moved.keys()
        gaps = [
            max(np.abs(after[k] - v).max() / np.abs(v).max() for k, v in before.items()) for after in (unchanged, moved)
        ]
        rows.append(
            (f"{name} of diffusers trained at learning rate 0: relative change of a weight", gaps[0], 1e-6, gaps[1])
        )
        if kind == "flux_control":
            rows += compare_control_loras(folder, root, found, base)
        if kind == "flux_lora":
            rows += compare_adapters(folder, root, found, base)
            for layout in ("kohya", "comfyui"):
                exported = infer(folder, kind, root, work / "layouts" / f"{layout}.safetensors")
                gap = np.abs(exported - images["ours"]).mean()
                rows.append(
                    (f"LoRA exported for {layout} in ours: difference of images, of 255", gap, 1.0, effect["ours"])
                )
    what = "Control-LoRA with the names of FLUX.1-Depth-dev-lora in ours: error by diffusers' conversion"
    rows.append((what, native_error(work / "layouts"), 0, None))
    for what, error in json.loads((work / "layouts" / "layouts.json").read_text()).items():
        rows.append((f"LoRA in diffusers' converters: {what}: relative error of a weight change", error, 1e-5, None))
    return rows
