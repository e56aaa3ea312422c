"""Checks that our code fits the mindone of this environment, by comparison with that of the CPU environment.

    python tests/contract/contract.py --reference PYTHON

`make contract` runs this. PYTHON is the interpreter with requirements.txt. Both interpreters make the same tiny models,
adapters, ControlNets and training steps; PYTHON writes its own to files. Prints a line per check and exits with 1 if
anything differs. Operators of mindone 0.5.0 without a CPU kernel are replaced (`cpu_kernels.py`), so this does not
check what an NPU computes.
"""

import argparse
import ast
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mindspore as ms
import numpy as np
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "tiny")]

import make_tiny_pipeline
import steps

from mindtune import cli
from mindtune.models import (
    configs,
    controlnets,
    execution,
    library,
    loading,
    lora,
    lora_settings,
    named_parameters,
    pipelines,
    precision,
)
from mindtune.models.shared_blocks import SharedBlockCell
from mindtune.models.weights import weight_files
from mindtune.run import tracking

FOLDERS = (
    *("mindtune", "flux_lora", "flux_controlnet"),
    *("examples/flux_kontext", "examples/flux_control", "examples/controlnet", "examples/tiny"),
)
PARTS = [
    (kind, part)
    for kind in ("flux", "sd15", "sdxl")
    for part in getattr(pipelines, f"{kind.rstrip('15')}_COMPONENTS".upper())
]
PARTS = [(kind, part) for kind, part in PARTS if "tokenizer" not in part and part != "scheduler"]
TARGETS = {"transformer": lora_settings.TRANSFORMER_TARGETS, "text_encoder": lora_settings.TEXT_ENCODER_TARGETS}
# Calls of methods: name -> (number of positional arguments, keywords).
FLUX_INPUTS = "hidden_states encoder_hidden_states pooled_projections timestep img_ids txt_ids guidance return_dict"
CALLS = {
    "FluxTransformer2DModel.construct": (0, f"{FLUX_INPUTS} controlnet_block_samples controlnet_single_block_samples"),
    "FluxControlNetModel.construct": (0, f"{FLUX_INPUTS} controlnet_cond conditioning_scale"),
    "UNet2DConditionModel.construct": (
        3, "added_cond_kwargs down_block_additional_residuals mid_block_additional_residual return_dict"
    ),
    "ControlNetModel.construct": (4, "added_cond_kwargs conditioning_scale return_dict"),
    "AutoencoderKL.encode": (1, ""), "AutoencoderKL.decode": (1, "return_dict"),
    "CLIPTextModel.construct": (1, "output_hidden_states"),
    "CLIPTextModelWithProjection.construct": (1, "output_hidden_states"),
    "T5EncoderModel.construct": (1, ""),
    "FluxTransformer2DModel.add_adapter": (1, ""), "CLIPTextModel.add_adapter": (1, ""),
    "UniPCMultistepScheduler.step": (3, "return_dict"), "UniPCMultistepScheduler.set_timesteps": (1, ""),
    "UniPCMultistepScheduler.from_config": (0, "config"), "FlowMatchEulerDiscreteScheduler.from_pretrained": (1, ""),
    **{f"{name}.{how}": (1, "") for how in ("load_config", "from_config") for name in (
        "FluxTransformer2DModel", "FluxControlNetModel", "UNet2DConditionModel", "ControlNetModel", "AutoencoderKL")},
    **{f"{name}.config_class.from_pretrained": (1, "") for name in (
        "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")},
    "LoraConfig.__init__": (0, "r lora_alpha lora_dropout init_lora_weights target_modules rank_pattern alpha_pattern"),
    "TrainStep.__init__": (2, "loss_scaler gradient_accumulation_steps gradient_accumulation_kwargs"),
    "TrainStep.scale_loss": (1, ""),
    "training_utils.GradAccumulator.__init__": (2, "sync_with_dataloader"),
}  # fmt: skip
# Largest relative difference allowed of (loss, gradients' norm, worst gradient). In fp16 the gradients of the SD
# ControlNets' condition embedding differ by up to 6%.
BOUNDS = {"fp16": (2e-3, 2e-3, 0.1), "": (1e-5, 1e-5, 1e-4)}

# Where requirements-ascend.txt has to be installable from wheels: glibc 2.28 is the oldest that pyarrow 21 supports.
MACHINES = ("x86_64", "aarch64")
TAGS = [f"manylinux_2_{minor}" for minor in (28, 27, 26, 24, 17, 12, 5)] + ["manylinux2014", "manylinux1"]
# On 3.9, mindone's omegaconf needs antlr4-python3-runtime, which is published as (pure Python) source only.
PYTHONS = {"3.9": ["--no-deps"], "3.10": [], "3.11": []}

rows: list[tuple[str, int, str, list[str]]] = []  # check, count, remark, problems


def wrong(what, expected, found):
    """[] if equal, else a list of one line."""
    return [] if expected == found else [f"{what}: expected {expected}, found {found}"]


# ---- imports and names ---------------------------------------------------------------------------


def sources():
    """All modules and scripts but pretrain_tiny_vae.py, which runs on PyTorch."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in paths if path.stem != "pretrain_tiny_vae"]


def module_name(path):
    """mindtune.models.lora of mindtune/models/lora.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def check_imports():
    problems = []
    for path in sources():
        try:
            if path.is_relative_to(ROOT / "mindtune"):
                importlib.import_module(module_name(path))
            else:
                steps.load_script(str(path.relative_to(ROOT)))
        except Exception as error:
            problems.append(f"{path.relative_to(ROOT)}: {type(error).__name__}: {error}")
    rows.append(("scripts and modules import", len(sources()), "", problems))


def mindone_names(tree):
    """The dotted names of mindone in a file, such as mindone.diffusers.training_utils.TrainStep."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mindone"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("mindone"))
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"mindone[.\w]+", name := ast.unparse(node)):
            yield name


def exists(name):
    """Whether a dotted name is a module or an attribute of one."""
    module, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
        return True
    except ImportError:
        return bool(module) and exists(module) and hasattr(resolve(module), attribute)


def resolve(name):
    """The object of a dotted name."""
    found = importlib.import_module(name.split(".")[0])
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    return found


def check_names():
    names = {name for path in sources() for name in mindone_names(ast.parse(path.read_text()))}
    # The classes in the tables of mindtune.models.pipelines are looked up by name.
    tables = (pipelines.FLUX_COMPONENTS, pipelines.SD_COMPONENTS, pipelines.SDXL_COMPONENTS)
    classes = {name for table in tables for part, found in table.items() if "tokenizer" not in part for name in found}
    classes |= {controlnet for controlnet, _ in pipelines.CONTROLNETS.values()}
    names |= {
        f"mindone.{'transformers' if name.startswith(('CLIP', 'T5')) else 'diffusers'}.{name}" for name in classes
    }
    dotted = {
        name for name in names if name.count(".") < 4
    }  # longer ones are attributes of a class, such as cls.__init__
    rows.append(
        ("names of mindone exist", len(dotted), "", [f"no {name}" for name in sorted(dotted) if not exists(name)])
    )


def find(name):
    """The function of a key of CALLS."""
    owner, *path = name.split(".")
    homes = (library, library.peft, library.mindone.diffusers, library.mindone.transformers)
    found = next(getattr(home, owner) for home in homes if hasattr(home, owner)) if owner != "training_utils" else None
    found = found or importlib.import_module("mindone.diffusers.training_utils")
    for part in path:
        found = getattr(found, part)
    return found


def call_problem(name, positional, keywords):
    """What is wrong with a call: [] or a list of lines."""
    function = find(name)
    signature = inspect.signature(function)
    bound = inspect.ismethod(function)
    keywords = keywords.split()
    try:
        signature.bind(*[None] * (positional + (not bound)), **dict.fromkeys(keywords))
    except TypeError as error:
        return [f"{name}: {error}"]
    # **kwargs accepts any keyword, so the keyword has to appear in the code.
    hidden = [word for word in keywords if word not in signature.parameters]
    code = inspect.getsource(inspect.unwrap(getattr(function, "__func__", function))) if hidden else ""
    return [f"{name}: nothing reads {word}" for word in hidden if f'"{word}"' not in code]


def check_calls():
    problems = [problem for name, call in CALLS.items() for problem in call_problem(name, *call)]
    rows.append(("calls bind to their signatures", len(CALLS), "", problems))


# ---- models, adapters, ControlNets ---------------------------------------------------------------


def shapes(parameters):
    return {name: list(parameter.shape) for name, parameter in parameters.items()}


def values(model):
    return {
        name: parameter.to(ms.float32).asnumpy() for name, parameter in named_parameters.model_parameters(model).items()
    }


def differing(what, expected, found):
    """A line for every array that differs in any bit, or for different names."""
    names = wrong(f"{what}: names", sorted(expected), sorted(found))
    return names or [f"{what}: {name} differs" for name in expected if not np.array_equal(expected[name], found[name])]


def adapted(root, part):
    """The model with a LoRA of weights that depend on the names of its parameters only."""
    model = loading.load_model(root, part, precision.resolve_precision("no"))
    lora.add_lora(model, lora.target_ranks(model, TARGETS[part], 4), 2.0, 0.0, ms.float32)
    lora.init_lora(model, seed=0)
    steps.give_values(
        {name: parameter for name, parameter in lora.lora_parameters(model).items() if ".lora_B." in name}
    )
    return model


def new_controlnets(work):
    """(name, a new ControlNet, the config of the model it is for)."""
    full = precision.resolve_precision("no")
    for kind, part in (("flux", "transformer"), ("sd15", "unet"), ("sdxl", "unet")):
        if kind == "flux":
            new = controlnets.flux_controlnet(work / kind, 1, 1)
        else:
            new = controlnets.unet_controlnet(loading.load_model(work / kind, part, full), 0)
        yield f"{kind}-controlnet", new, configs.read_config(work / kind, part)


def write_reference(work):
    """Writes everything that the other interpreter compares with."""
    facts = {}
    for kind, make in make_tiny_pipeline.KINDS.items():
        make(work / kind)
    for kind, part in PARTS:
        full = precision.resolve_precision("no")
        facts[f"{kind}/{part}"] = shapes(named_parameters.model_parameters(loading.load_model(work / kind, part, full)))
    for kind, part in adaptable():
        model = adapted(work / kind, part)
        facts[f"{kind}/{part} with LoRA"] = shapes(lora.lora_parameters(model))
        lora.save_lora(work / f"{kind}-{part}.safetensors", {part: model}, ms.float32)
    for name, model, _ in new_controlnets(work):
        facts[name] = shapes(named_parameters.model_parameters(model))
        loading.save_model(model, work / name, ms.float32)
    (work / "facts.json").write_text(json.dumps({"versions": tracking.package_versions(), "shapes": facts}))
    numbers = {f"{name}/{key}": value for name, step in steps.STEPS.items() for key, value in step(work).items()}
    np.savez(work / "steps.npz", **numbers)


def adaptable():
    """The models that a LoRA adapts: FLUX's transformer and CLIP."""
    return [("flux", "transformer"), ("flux", "text_encoder")]


def check_models(work, facts):
    problems = []
    count = 0
    full = precision.resolve_precision("no")
    half = precision.resolve_precision("fp16")
    for kind, part in PARTS:
        root = work / kind
        label = f"{kind}/{part}"
        path = weight_files(root, part)[0]
        file = load_file(path)
        model = loading.load_model(root, part, full)
        problems += wrong(f"{label}: names and shapes", facts[label], shapes(named_parameters.model_parameters(model)))
        problems += differing(label, file, values(model))
        # T5's `wo` overflows in fp16 and stays in float32.
        loaded = loading.load_model(root, part, half)
        wide = [name for name in file if kind == "flux" and ".wo." in name]
        rounded = {name: value if name in wide else value.astype(np.float16) for name, value in file.items()}
        problems += differing(f"{label} in fp16", rounded, values(loaded))
        single = {
            name
            for name, parameter in named_parameters.model_parameters(loaded).items()
            if parameter.dtype != ms.float16
        }
        problems += wrong(f"{label} in fp16: what stays float32", sorted(wide), sorted(single))
        problems += refused_without_a_tensor(work, kind, part, file)
        count += len(file)
    rows.append(
        ("models load: names, shapes, bits, fp16, a missing tensor", len(PARTS), f"{count} parameters", problems)
    )


def refused_without_a_tensor(work, kind, part, file):
    """mindone initializes missing tensors at random; loading has to notice every one."""
    copy = work / "incomplete" / part
    missed = sorted(file)[len(file) // 2]
    shutil.rmtree(copy.parent, ignore_errors=True)
    shutil.copytree(work / kind / part, copy)
    path = copy / weight_files(work / kind, part)[0].name
    save_file({name: value for name, value in file.items() if name != missed}, path, metadata={"format": "pt"})
    try:
        loading.load_model(copy.parent, part, precision.resolve_precision("no"))
    except cli.UserError as error:
        return [] if "lack 1 tensors" in str(error) else [f"{kind}/{part} without {missed}: {error}"]
    return [f"{kind}/{part} loads without {missed}"]


def check_loras(work, facts):
    problems = []
    for kind, part in adaptable():
        label = f"{kind}/{part}"
        theirs = work / f"{kind}-{part}.safetensors"
        ours = work / "ours.safetensors"
        model = adapted(work / kind, part)
        problems += wrong(f"{label} with LoRA", facts[f"{label} with LoRA"], shapes(lora.lora_parameters(model)))
        problems += wrong(
            f"{label}: number of trainable parameters", len(lora.lora_parameters(model)), len(model.trainable_params())
        )
        lora.save_lora(ours, {part: model}, ms.float32)
        problems += [] if ours.read_bytes() == theirs.read_bytes() else [f"{label}: the saved file has other bytes"]
        fresh = loading.load_model(work / kind, part, precision.resolve_precision("no"))
        lora.load_lora(theirs, {part: fresh}, ms.float32)
        found = {f"{part}.{name}": parameter.asnumpy() for name, parameter in lora.lora_parameters(fresh).items()}
        problems += differing(f"{label}: the loaded LoRA", load_file(theirs), found)
        layers = [cell for _, cell in fresh.cells_and_names() if isinstance(cell, library.BaseTunerLayer)]
        lora.enable_lora(fresh, False)
        if not layers or not all(cell._disable_adapters for cell in layers):
            problems.append(f"{label}: is not disabled")
        lora_settings.check_targets(lora.linear_names(fresh), [f"{TARGETS[part][0]}.base_layer"], "a target")
    rows.append(
        ("LoRAs: injected, saved, loaded, disabled", len(adaptable()), "the files have the same bytes", problems)
    )


def check_controlnets(work, facts):
    problems = []
    for name, model, base in new_controlnets(work):
        problems += wrong(f"{name}: names and shapes", facts[name], shapes(named_parameters.model_parameters(model)))
        loading.save_model(model, work / "ours", ms.float32)
        file = "diffusion_pytorch_model.safetensors"
        problems += differing(
            f"{name}: initial weights", load_file(work / name / file), load_file(work / "ours" / file)
        )
        for folder in (work / name, work / "ours"):
            pipelines.resolve_controlnet(str(folder), "--controlnet", None, base)
            loaded = loading.load_model(work, folder.name, precision.resolve_precision("no"))
            problems += differing(f"{name} from {folder.name}", values(model), values(loaded))
    rows.append(("ControlNets: initialized, saved, loaded", 3, "initial weights have the same bits", problems))


def check_attributes(work):
    """Attributes of models and schedulers that our code reads."""
    full = precision.resolve_precision("no")
    flux = loading.load_model(work / "flux", "transformer", full)
    unet = loading.load_model(work / "sdxl", "unet", full)
    vae = loading.load_model(work / "flux", "vae", full)
    clip = loading.load_model(work / "flux", "text_encoder", full)
    t5 = loading.load_model(work / "flux", "text_encoder_2", full)
    scheduler = loading.load_scheduler(work / "flux")
    vae_keys = {"scaling_factor", "shift_factor", "latent_channels", "block_out_channels"}
    unet_kinds = {type(cell).__name__ for _, cell in unet.cells_and_names()}
    replaced = [
        cell for _, cell in flux.cells_and_names() if type(cell).__module__ == "mindtune.models.replaced_layers"
    ]
    checks = {
        "FLUX's blocks": len(flux.transformer_blocks) == len(flux.single_transformer_blocks) == 2,
        "config by key": flux.config["guidance_embeds"] and unet.config["addition_embed_type"] == "text_time",
        "the VAE's config": vae_keys <= set(vae.config),
        "CLIP's layers": len(clip.text_model.encoder.layers) == 2,
        "T5's layers in float32": "wo" in t5._keep_in_fp32_modules,
        "the scheduler's sigmas": scheduler.sigmas.shape == (1000,),
        "shared FLUX blocks": sum(isinstance(cell, SharedBlockCell) for _, cell in flux.cells_and_names()) == 5,
        "FLUX's sinusoids replaced": any(type(cell).__name__ == "Timesteps" for cell in replaced),
        "a UNet's blocks to recompute": {"ResnetBlock2D", "BasicTransformerBlock"} <= unet_kinds,
        "inference without a graph": hasattr(library.pynative_no_grad(), "__enter__"),
    }  # fmt: skip
    rows.append(
        (
            "attributes of models and schedulers",
            len(checks),
            "",
            [f"fails: {what}" for what, so in checks.items() if not so],
        )
    )


# ---- training steps ------------------------------------------------------------------------------


def relative(expected, found, least=1e-12):
    """The largest difference, relative to the largest entry or to `least`, whichever is larger."""
    return float(np.abs(expected.astype(np.float64) - found).max() / max(np.abs(expected).max(), least))


def check_steps(work):
    if not tracking.package_versions()["mindone"].startswith("0.3."):
        import cpu_kernels

        cpu_kernels.install()
    theirs = np.load(work / "steps.npz")
    for name, step in steps.STEPS.items():
        expected = {key.partition("/")[2]: theirs[key] for key in theirs.files if key.partition("/")[0] == name}
        try:
            found = step(work)
        except Exception as error:
            rows.append((name, 0, "", [f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0]}"]))
            continue
        # In an attention over a single key, the gradients of queries and keys are only rounding errors.
        least = (1e-3 if "fp16" in name else 1e-5) * max(np.abs(value).max() for value in expected.values())
        errors = {key: relative(value, found[key], least) for key, value in expected.items()}
        if "loss" in errors:
            bounds = next(bound for word, bound in BOUNDS.items() if word in name)
            seen = {"loss": errors.pop("loss"), "norm": errors.pop("norm")}
            seen["worst gradient"] = float(np.max([*errors.values()]))
        else:
            bounds = (1e-5,)
            seen = {"worst output": float(np.max([*errors.values()]))}
        remark = ", ".join(f"{what} {error:.1e}" for what, error in seen.items())
        problems = [
            f"{name}: {what} {error:.1e}" for (what, error), bound in zip(seen.items(), bounds) if not error <= bound
        ]
        rows.append((name, len(errors), remark, problems))


# ---- requirements --------------------------------------------------------------------------------


def resolved(machine, python, flags, work):
    """The wheels that pip would install on such a machine, without installing; or a line that says what has none."""
    platforms = [f"--platform={tag}_{machine}" for tag in TAGS]
    line = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--only-binary=:all:"]
    line += [*platforms, f"--python-version={python}", "--implementation=cp", f"--target={work / 'nowhere'}", *flags]
    report = work / "wheels.json"
    line += ["--disable-pip-version-check", f"--report={report}", "-r", str(ROOT / "requirements-ascend.txt")]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        return [], f"{machine}, CPython {python}: {(errors or ['pip failed'])[-1]}"
    found = json.loads(report.read_text())["install"]
    return [item["download_info"]["url"].rsplit("/", 1)[-1] for item in found], None


def check_requirements(work):
    problems, wheels = [], set()
    for machine in MACHINES:
        for python, flags in PYTHONS.items():
            found, problem = resolved(machine, python, flags, work)
            wheels.update(found)
            problems += [problem] if problem else []
    pairs = f"{', '.join(MACHINES)}; CPython {', '.join(PYTHONS)}"
    rows.append(("requirements-ascend.txt resolves to wheels", len(wheels), pairs, problems))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reference", help="Python interpreter with requirements.txt.")
    parser.add_argument(
        "--write", type=Path, metavar="WORK", help="Only write the files of this interpreter to the folder WORK."
    )
    args = parser.parse_args()
    execution.set_up_device(graph_mode=False)
    if args.write:
        write_reference(args.write)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        subprocess.run([args.reference, __file__, "--write", folder], check=True, stderr=subprocess.DEVNULL)
        written = json.loads((work / "facts.json").read_text())
        for check in (
            check_imports,
            check_names,
            check_calls,
            check_models,
            check_loras,
            check_controlnets,
            check_attributes,
            check_steps,
            check_requirements,
        ):
            given = (work, written["shapes"])[: len(inspect.signature(check).parameters)]
            try:
                check(*given)
            except Exception as error:  # the other checks still run
                rows.append((check.__name__, 0, "stopped", [f"{check.__name__}: {type(error).__name__}: {error}"]))
    for who, versions in (("reference", written["versions"]), ("here", tracking.package_versions())):
        shown = [f"{name} {versions[name]}" for name in ("mindspore", "mindone", "transformers")]
        print(f"{who}: {', '.join(shown)}")
    for what, count, remark, problems in rows:
        print(f"{'MISS' if problems else 'ok':4}  {what:56}  {count:4}  {remark}")
    problems = [problem for *_, found in rows for problem in found]
    print(*problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # at a normal exit MindSpore prints an error for every cell
