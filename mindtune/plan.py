"""What a run will need of memory, from configs and flags alone: no weights are read and none allocated.

Weights, gradients and optimizer state are counted exactly. Activations that the backward pass waits for are counted in tensors a block
keeps (KEPT), measured once on the CPU; what the CPU's runtime adds to a process is in CPU. benchmarks/memory_plan.py compares the plan
with measured peaks. On an NPU nothing of this was measured by us.
"""

from __future__ import annotations

import math
import runpy
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple, Optional

import mindspore as ms

from mindtune.cli import UserError, run
from mindtune.data.buckets import crop_sizes
from mindtune.models.configs import read_config
from mindtune.models.controlnets import controlnet_shapes
from mindtune.models.loading import component_shapes
from mindtune.models.lora import TEXT_ENCODER_TARGETS, TRANSFORMER_TARGETS
from mindtune.models.named_parameters import ParameterShape
from mindtune.models.precision import DTYPES
from mindtune.optim.adam8bit import BLOCK, SMALLEST
from mindtune.run.tracking import peak_memory_mb

MB = 1 << 20
BYTES = {"no": 4, "fp32": 4, "fp16": 2, "bf16": 2}
# Of a block: tensors as large as its output that the backward pass waits for, in a graph and in PyNative, and how often attention's
# weights (heads x tokens x tokens) are among them. `condition` is the part of a UNet's ControlNet that reads the picture.
KEPT = {
    "double": (25.0, 35.0, 1.0), "single": (25.0, 35.0, 1.0), "residual": (16.0, 16.0, 0.0), "attention": (16.0, 16.0, 2.5),
    "condition": (23.0, 23.0, 0.0),
}  # fmt: skip
# What this machine's runtime adds, fitted to the runs of benchmarks/memory_plan.py: the process with its libraries; a graph of FLUX and
# each call of a block in it; each block of a UNet's graph; copies of what trains (for shared functions, clipped, written to a
# checkpoint), in a graph and in PyNative; and while a block is computed tensors as large as its output and as attention's weights.
CPU = {
    "process": 528 * MB, "flux": 600 * MB, "call": 6 * MB, "unet block": 54 * MB, "copies": (6.2, 5.5), "outputs": (17.0, 0.0),
    "weights": (4.2, 7.3),
}  # fmt: skip


class Part(NamedTuple):
    """A module in the training process: parameters, the type it is stored in, bytes."""

    name: str
    parameters: int
    stored: str
    size: int


class Plan(NamedTuple):
    """Bytes. `kept` and `recomputed` are the activations without and with gradient checkpointing, `activations` those of this run."""

    parts: list[Part]
    gradients: int
    optimizer: int
    host_optimizer: int
    average: int
    kept: int
    recomputed: int
    activations: int
    loading: int
    runtime: int

    def device(self, workers: int = 1, zero_stage: int = 0) -> int:
        """On each of so many devices under data parallel; ZeRO stage 1 shares out the optimizer's state."""
        state = self.optimizer // workers if zero_stage == 1 else self.optimizer
        return sum(part.size for part in self.parts) + self.gradients + state + self.average + self.activations

    def process(self) -> int:
        """The training process's peak on the CPU."""
        return self.device() + self.host_optimizer + self.runtime


# ---- counting ------------------------------------------------------------------------------------


@cache
def _shapes(root: Path, name: str) -> list[ParameterShape]:
    return component_shapes(root, name)


@cache
def _controlnet_shapes(root: Path, base: str, *blocks: int) -> list[ParameterShape]:
    return controlnet_shapes(root, base, *blocks)


def _frozen(name: str, found: Iterable[ParameterShape], precision: str, int8: bool = False) -> Part:
    """int8 weights have a float32 scale for each output."""
    width, size, count = BYTES[precision], 0, 0
    for shape in found:
        elements = math.prod(shape.shape)
        count += elements
        size += elements + 4 * shape.shape[0] if int8 and shape.linear else width * elements
    stored = str(DTYPES[precision]).lower()
    return Part(name, count, f"int8, {stored}" if int8 else stored, size)


def _adapter(found: Iterable[ParameterShape], targets: list[str], rank: int) -> list[tuple[int, ...]]:
    """Shapes of A and B beside every linear layer that a target's name ends."""
    layers = [shape for shape in found if shape.linear]
    chosen = [s.shape for s in layers if any(f".{s.name}".endswith(f".{target}.weight") for target in targets)]
    return [each for out, into in chosen for each in ((rank, into), (out, rank))]


def _state(trained: list[tuple[int, ...]], optimizer: str, eight_bit: bool) -> int:
    """Bytes that the optimizer remembers of the trained tensors."""
    sizes = [math.prod(shape) for shape in trained]
    if eight_bit:
        return sum(2 * (-(-size // BLOCK)) * (BLOCK + 4) if size >= SMALLEST else 8 * size for size in sizes)
    if optimizer == "adafactor":
        return sum(
            4 * (math.prod(s[:-1]) + math.prod(s[:-2] + s[-1:])) if len(s) > 1 else 4 * math.prod(s) for s in trained
        )
    return (16 if optimizer == "prodigy" else 8) * sum(sizes)


# ---- activations ---------------------------------------------------------------------------------


class Unit(NamedTuple):
    """A block: its kind in KEPT, the elements of its output, those of its attention's weights."""

    kind: str
    output: int
    weights: int = 0


def _flux_units(
    config: dict, batch: int, tokens: int, text: int, blocks: Optional[tuple[int, int]] = None
) -> list[Unit]:
    double, single = blocks or (config["num_layers"], config["num_single_layers"])
    heads, both = config["num_attention_heads"], tokens + text
    output, weights = batch * both * heads * config["attention_head_dim"], batch * heads * both * both
    return [Unit("double", output, weights)] * double + [Unit("single", output, weights)] * single


def _unet_units(config: dict, batch: int, height: int, width: int, text: int, up: bool, down: bool) -> list[Unit]:
    """Residual and transformer blocks of a UNet's halves (the middle belongs to both), latents of `height` x `width`."""
    channels, levels = config["block_out_channels"], len(config["block_out_channels"])
    every = lambda value: list(value) if isinstance(value, (list, tuple)) else [value] * levels  # noqa: E731
    layers, heads = (
        every(config["layers_per_block"]),
        every(config.get("num_attention_heads") or config["attention_head_dim"]),
    )
    depth = every(config.get("transformer_layers_per_block", 1))
    up_depth = config.get("reverse_transformer_layers_per_block") or depth[::-1]

    def level(number, count, depths, attends):
        """`depths`: transformer blocks behind each of `count` residual blocks, one number for all or one for each."""
        size = batch * (height >> number) * (width >> number)
        weights = size * heads[number] * ((height >> number) * (width >> number) + text)
        attention = Unit("attention", size * channels[number], weights)
        depths = (list(depths) if isinstance(depths, (list, tuple)) else [depths]) * count
        return [
            unit
            for n in depths[:count]
            for unit in (Unit("residual", size * channels[number]), *[attention] * (n if attends else 0))
        ]

    units, last = [], levels - 1
    if config.get("mid_block_type", True):
        attends = config.get("mid_block_type") != "UNetMidBlock2D"
        units = level(last, 1, depth[last], attends) + level(last, 1, 0, False)
    for number in range(levels):
        if down:
            units += level(
                number, layers[number], depth[number], config["down_block_types"][number].startswith("CrossAttn")
            )
        if up:
            attends = config["up_block_types"][last - number].startswith("CrossAttn")
            units += level(number, layers[number] + 1, up_depth[last - number], attends)
    return units


def _kept(units: list[Unit], width: int, graph: bool, fused: bool) -> tuple[int, int]:
    """Bytes that the backward pass waits for without recomputing, and with: the blocks' inputs. `fused` attention keeps no weights."""
    kept = inputs = 0.0
    for unit in units:
        in_graph, in_pynative, weights = KEPT[unit.kind]
        own = width * (unit.output * (in_graph if graph else in_pynative) + (0 if fused else weights * unit.weights))
        kept += own
        inputs += own if unit.kind == "condition" else width * unit.output
    return int(kept), int(inputs)


# ---- the plan ------------------------------------------------------------------------------------


def make_plan(kind: str, root: Path, flags: dict, existing: Optional[Path] = None, on_cpu: bool = False) -> Plan:
    """Of a script's run: `kind` is flux_lora, flux_controlnet, controlnet or controlnet_sdxl, `root` a pipeline's folder (its configs are
    enough), `flags` all of the script's, `existing` the folder of a ControlNet to go on from; on an NPU, or `on_cpu` on this machine."""
    flux, precision, graph = kind.startswith("flux"), flags["mixed_precision"], flags["mindspore_mode"] == 0
    compute = 4 if on_cpu and precision == "bf16" else BYTES[precision]
    base, int8 = "transformer" if flux else "unet", flags.get("base_precision") == "int8"
    config, vae = read_config(root, base), read_config(root, "vae")
    parts = [_frozen(base, _shapes(root, base), precision, int8)]
    trained: list[tuple[int, ...]] = []
    if kind == "flux_lora":
        targets = [t.strip() for t in flags["lora_layers"].split(",")] if flags["lora_layers"] else TRANSFORMER_TARGETS
        trained = _adapter(_shapes(root, base), targets, flags["lora_rank"])
        if flags["train_text_encoder"]:
            parts.append(_frozen("text_encoder", _shapes(root, "text_encoder"), precision))
            trained += _adapter(_shapes(root, "text_encoder"), TEXT_ENCODER_TARGETS, flags["lora_rank"])
    else:
        blocks = (flags["num_double_layers"], flags["num_single_layers"]) if flux else ()
        found = _shapes(existing.parent, existing.name) if existing else _controlnet_shapes(root, base, *blocks)
        trained = [shape.shape for shape in found]
    count = sum(map(math.prod, trained))
    parts.append(Part("LoRA" if kind == "flux_lora" else "controlnet", count, "float32", 4 * count))
    if not flags["cache_latents"]:
        parts.append(_frozen("vae", _shapes(root, "vae"), precision))

    units = _units(kind, flags, config, vae, read_config(existing.parent, existing.name) if existing else None)
    fused = not on_cpu and compute == 2
    kept, recomputed = _kept(units, compute, graph, fused)
    if not on_cpu:  # there it is in what the runtime adds
        recomputed += _largest_block(units, compute, fused)
    layer = max(math.prod(shape.shape) for shape in _shapes(root, base) if shape.linear)
    state = _state(trained, flags["optimizer"], flags["use_8bit_adam"])
    offload = bool(flags.get("offload_optimizer"))
    return Plan(
        parts=parts,
        gradients=4 * count * (2 if flags["gradient_accumulation_steps"] > 1 else 1),
        optimizer=0 if offload else state,
        host_optimizer=state if offload else 0,
        average=4 * count if flags.get("use_ema") else 0,
        kept=kept,
        recomputed=recomputed,
        activations=recomputed if flags["gradient_checkpointing"] else kept,
        loading=int(1.01 * sum(part.size for part in parts)),
        runtime=_runtime(units, compute, graph, count, layer if int8 else 0) if on_cpu else 0,
    )


def encode_peak(kind: str, root: Path, flags: dict) -> int:
    """Bytes that the encode stage needs: its largest encoder (one is there at a time), or the VAE with the activations of a picture."""
    precision, sizes = flags["mixed_precision"], []
    for name in ["text_encoder"] + ["text_encoder_2"] * (kind != "controlnet"):
        int8 = flags.get("base_precision") == "int8" and read_config(root, name)["architectures"] == ["T5EncoderModel"]
        sizes.append(_frozen(name, _shapes(root, name), precision, int8).size)
    on_cpu, pixels = (
        ms.get_context("device_target") == "CPU",
        math.prod(max(crop_sizes(flags.get("aspect_ratio_buckets"), flags["resolution"]), key=math.prod)),
    )
    width = 4 if on_cpu else BYTES[precision]
    # The widest tensors of an encoder are its first level's, at the picture's own size; six of them are there at a time.
    sizes.append(
        _frozen("vae", _shapes(root, "vae"), precision).size
        + 6 * width * pixels * read_config(root, "vae")["block_out_channels"][0]
    )
    return max(sizes) + (CPU["process"] if on_cpu else 0)


def _units(kind: str, flags: dict, config: dict, vae: dict, existing: Optional[dict]) -> list[Unit]:
    """The blocks that a gradient passes, at the largest picture."""
    height, width = max(crop_sizes(flags.get("aspect_ratio_buckets"), flags["resolution"]), key=math.prod)
    factor, batch = 2 ** (len(vae["block_out_channels"]) - 1), flags["train_batch_size"]
    rows, columns = height // factor, width // factor
    if kind == "flux_lora":
        batch *= 2 if flags["with_prior_preservation"] else 1
        return _flux_units(config, batch, rows * columns // 4, flags["max_sequence_length"])
    if kind == "flux_controlnet":
        tokens, text = rows * columns // 4, flags["max_sequence_length"]
        own = existing or {"num_layers": flags["num_double_layers"], "num_single_layers": flags["num_single_layers"]}
        blocks = own["num_layers"], own["num_single_layers"]
        frozen = (
            max(0, config["num_layers"] - 1),
            config["num_single_layers"],
        )  # residuals enter after the first block
        return _flux_units(config, batch, tokens, text, blocks) + _flux_units(config, batch, tokens, text, frozen)
    units = _unet_units(config, batch, rows, columns, 77, up=False, down=True)
    units.append(Unit("condition", 64 * batch * height * width))  # its layers' outputs are 64 numbers a pixel together
    return units + _unet_units(config, batch, rows, columns, 77, up=True, down=False)


def _largest_block(units: list[Unit], width: int, fused: bool) -> int:
    """Bytes of the block that is being computed again, when blocks are."""
    return max(_kept([unit], width, True, fused)[0] for unit in units)


def _runtime(units: list[Unit], width: int, graph: bool, trained: int, int8_layer: int) -> int:
    """What the CPU's runtime adds; of `trained` elements, and with int8 weights those of the largest layer, three times in float32."""
    mode, blocks = 0 if graph else 1, [unit for unit in units if unit.kind != "condition"]
    size = CPU["process"] + 4 * CPU["copies"][mode] * trained + 3 * 4 * int8_layer
    if graph:
        flux = blocks[0].kind in ("double", "single")
        size += CPU["flux"] + CPU["call"] * len(blocks) if flux else CPU["unet block"] * len(blocks)
    if blocks[0].kind in ("double", "single"):
        output, weights = (max(getattr(unit, field) for unit in blocks) for field in ("output", "weights"))
        size += width * (CPU["outputs"][mode] * output + CPU["weights"][mode] * weights)
    return int(size)


# ---- telling -------------------------------------------------------------------------------------

# What saves memory, what costs least in quality and time first: flag, its value, what it costs.
SAVINGS = [
    ("cache_latents", True, "every picture keeps one crop"),
    ("mixed_precision", "bf16", "rounding; faster on Ascend"),
    ("gradient_checkpointing", True, "about a third more time"),
    ("use_8bit_adam", True, "coarser moments"),
    ("base_precision", "int8", "rounding of the frozen weights, some time"),
    ("offload_optimizer", True, "time; moments go to the host"),
    ("train_batch_size", 1, "more steps: raise --gradient_accumulation_steps by as much"),
    ("max_sequence_length", 128, "longer prompts are cut"),
    ("resolution", 256, "smaller pictures"),
]


def suggestions(
    kind: str, root: Path, flags: dict, limit: int, existing: Optional[Path] = None
) -> tuple[list[str], int]:
    """Flags to add, one after the other until a device holds it, with what each saves and costs; and the bytes needed then."""
    flags, lines = dict(flags), []
    needed = make_plan(kind, root, flags, existing).device()
    for flag, value, cost in SAVINGS:
        if needed <= limit:
            break
        adamw, graph = flags["optimizer"] == "adamw", flags["mindspore_mode"] == 0
        clash = {"use_8bit_adam": not adamw, "offload_optimizer": flags["use_8bit_adam"] or not (adamw and graph)}
        if flag not in flags or flags[flag] == value or clash.get(flag):
            continue
        if isinstance(value, int) and not isinstance(value, bool) and flags[flag] < value:
            continue
        after = make_plan(kind, root, {**flags, flag: value}, existing).device()
        if after < 0.99 * needed:
            given = f"--{flag}" if value is True else f"--{flag} {value}"
            lines.append(f"{given:28s} saves {_gb(needed - after)}: {cost}")
            flags[flag], needed = value, after
    return lines, needed


def describe(kind: str, root: Path, flags: dict, device_gb: float, existing: Optional[Path] = None) -> str:
    """The plan as a table, with whether it fits a device of so many GB and, if not, what would make it fit."""
    plan, rows = make_plan(kind, root, flags, existing), []
    on_cpu = ms.get_context("device_target") == "CPU"
    for part in plan.parts:
        rows.append((part.name, f"{part.parameters:,}", part.stored, _gb(part.size)))
    rows += [
        ("gradients", "", "float32", _gb(plan.gradients)),
        ("optimizer", "", "", _gb(plan.optimizer or plan.host_optimizer)),
    ]
    if plan.host_optimizer:
        rows[-1] = ("optimizer, on the host", "", "", _gb(plan.host_optimizer))
    if plan.average:
        rows.append(("moving average", "", "float32", _gb(plan.average)))
    used = " (this run)"
    rows.append(("activations, kept" + used * (plan.activations == plan.kept), "", "", _gb(plan.kept)))
    rows.append(("activations, recomputed" + used * (plan.activations != plan.kept), "", "", _gb(plan.recomputed)))
    rows.append(("an Ascend device, alone or of several", "", "", _gb(plan.device())))
    for workers in (2, 8):
        rows.append((f"each of {workers}, sharing the optimizer (ZeRO 1)", "", "", _gb(plan.device(workers, 1))))
    rows.append(("host, while loading", "", "", _gb(plan.loading)))
    rows.append(("encode stage, a process of its own", "", "", _gb(encode_peak(kind, root, flags))))
    if on_cpu:
        rows.append(
            (
                "on this CPU instead: the process",
                "",
                "",
                _gb(make_plan(kind, root, flags, existing, on_cpu=True).process()),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"{a:{widths[0]}}  {b:>{widths[1]}}  {c:{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in rows]
    limit = int(device_gb * (1 << 30))
    if plan.device() <= limit:
        return "\n".join([*lines, f"fits a device of {device_gb:g} GB"])
    saved, needed = suggestions(kind, root, flags, limit, existing)
    lines.append(f"does not fit a device of {device_gb:g} GB. Add, in this order:")
    lines += [f"  {line}" for line in saved] + [
        f"then it takes {_gb(needed)}" + ("" if needed <= limit else ", which is still too much")
    ]
    return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / (1 << 30):.2f} GB" if size >= 100 * MB else f"{size / MB:.1f} MB"


def measured(kind: str, root: Path, flags: dict, existing: Optional[Path] = None) -> dict[str, float]:
    """For run.json: the plan's prediction and the peak of this process so far, in MB; on an NPU those of the device's memory."""
    on_cpu = ms.get_context("device_target") == "CPU"
    plan = make_plan(kind, root, flags, existing, on_cpu)
    if on_cpu:
        return {"predicted_mb": plan.process() / MB, "measured_mb": peak_memory_mb()["training_process"]}
    return {"predicted_mb": plan.device() / MB, "measured_mb": ms.runtime.max_memory_allocated() / MB}


def main() -> Optional[int]:
    """python -m mindtune.plan --script PATH flags: the script's own --dry_run."""
    if len(sys.argv) < 3 or sys.argv[1] != "--script" or not Path(sys.argv[2]).is_file():
        raise UserError(
            "python -m mindtune.plan --script PATH flags: PATH is a training script, flags are those that it shall run with."
        )
    sys.argv = [sys.argv[2], *sys.argv[3:], "--dry_run"]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    run(main)
