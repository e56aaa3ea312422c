"""The memory plan as a user sees it: the table, the flags that would save memory, and the numbers in run.json."""

from __future__ import annotations

from typing import NamedTuple, Union

import mindspore as ms

from mindtune.cli import UserError, size_text
from mindtune.run.memory import GB, MB, Plan, Settings, encode_peak, make_plan
from mindtune.run.tracking import peak_memory_mb


class Saving(NamedTuple):
    """A flag that saves memory, its value, what it costs, and whether only the FLUX scripts have it."""

    flag: str
    value: Union[bool, int, str]
    cost: str
    flux_only: bool = False


# The least costly in quality and time first.
SAVINGS = [
    Saving("cache_latents", True, "every image keeps one crop"),
    Saving("mixed_precision", "bf16", "rounding; faster on Ascend"),
    Saving("gradient_checkpointing", True, "about a third more time"),
    Saving("use_8bit_adam", True, "coarser moments"),
    Saving("base_precision", "int8", "rounding of the frozen weights, some time", flux_only=True),
    Saving("offload_optimizer", True, "time; moments move to the host"),
    Saving("train_batch_size", 1, "more steps: raise --gradient_accumulation_steps by the same factor"),
    Saving("max_sequence_length", 128, "longer prompts are cut", flux_only=True),
    Saving("resolution", 256, "smaller images"),
]


def _applies(saving: Saving, settings: Settings) -> bool:
    """Whether the script has the flag, it works with the other flags, and the value is not reached already."""
    if saving.flux_only and not settings.flux:
        return False
    if saving.flag == "use_8bit_adam" and settings.optimizer != "adamw":
        return False
    if saving.flag == "offload_optimizer" and (
        settings.use_8bit_adam or settings.optimizer != "adamw" or settings.mindspore_mode != 0
    ):
        return False
    current = getattr(settings, saving.flag)
    if isinstance(saving.value, int) and not isinstance(saving.value, bool):
        return (max(current) if isinstance(current, list) else current) > saving.value
    return current != saving.value


def suggestions(settings: Settings, limit: int) -> tuple[list[str], int]:
    """Flags to add until the run fits in `limit` bytes of device memory, and the bytes that it needs with all of them.

    One line per flag, with what it saves and costs. If the flags are not enough, the second value is above `limit`.
    """
    lines = []
    needed = make_plan(settings).device()
    for saving in SAVINGS:
        if needed <= limit:
            break
        if not _applies(saving, settings):
            continue
        changed = settings._replace(**{saving.flag: saving.value})
        after = make_plan(changed).device()
        if after < 0.99 * needed:
            words = f"--{saving.flag}" if saving.value is True else f"--{saving.flag} {saving.value}"
            lines.append(f"{words:28s} saves {size_text(needed - after)}: {saving.cost}")
            settings, needed = changed, after
    return lines, needed


def check_fit(settings: Settings) -> None:
    """Raises UserError if --fit cannot make the run fit: with all blocks recomputed it needs too much memory."""
    if not settings.fit:
        return
    needed, limit = make_plan(settings).device(), settings.device_memory_gb * GB
    if needed > limit:
        raise UserError(
            f"--fit: the run needs {size_text(needed)} with all blocks recomputed, and --device_memory_gb is "
            f"{settings.device_memory_gb:g}. --dry_run lists flags that need less memory."
        )


def describe(settings: Settings) -> str:
    """The plan as a table, whether it fits a device of `device_memory_gb` (2^30 bytes), and if not the flags to add."""
    plan = make_plan(settings)
    rows = _rows(plan)
    rows.append(("encoder stage (separate process)", "", "", size_text(encode_peak(settings))))
    if ms.get_context("device_target") == "CPU":
        rows.append(("training process on this CPU", "", "", size_text(make_plan(settings, on_cpu=True).process())))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{name:{widths[0]}}  {count:>{widths[1]}}  {dtype:{widths[2]}}  {size:>{widths[3]}}"
        for name, count, dtype, size in rows
    ]
    limit = int(settings.device_memory_gb * GB)
    if plan.device() <= limit:
        lines.append(f"fits a device of {settings.device_memory_gb:g} GB")
    else:
        lines += _advice(settings, limit)
    return "\n".join(lines)


def _advice(settings: Settings, limit: int) -> list[str]:
    """What to change if the run does not fit in `limit` bytes."""
    flags, needed = suggestions(settings, limit)
    lines = [f"does not fit a device of {settings.device_memory_gb:g} GB. Add these flags, in this order:"]
    lines += [f"  {flag}" for flag in flags]
    lines.append(
        f"with them a device needs {size_text(needed)}" + ("" if needed <= limit else ", which is still too much")
    )
    fitting = settings._replace(fit=True, gradient_checkpointing_blocks=None)
    plan = make_plan(fitting)
    if not settings.fit and plan.device() <= limit:
        blocks = f"{plan.recomputed_blocks} of {plan.blocks} blocks"
        lines.append(f"--fit alone is enough: it recomputes {blocks}, and a device needs {size_text(plan.device())}")
    return lines


def _rows(plan: Plan) -> list[tuple[str, str, str, str]]:
    """(name, number of parameters, dtype, size) per row of the table."""
    rows = [(part.name, f"{part.parameters:,}", part.dtype, size_text(part.size)) for part in plan.parts]
    rows.append(("gradients", "", "float32", size_text(plan.gradients)))
    if plan.host_optimizer:
        rows.append(("optimizer state, on the host", "", "", size_text(plan.host_optimizer)))
    else:
        rows.append(("optimizer state", "", "", size_text(plan.optimizer)))
    if plan.average:
        rows.append(("moving average", "", "float32", size_text(plan.average)))
    sizes = {0: plan.kept, plan.recomputed_blocks: plan.activations, plan.blocks: plan.recomputed}
    for count, size in sorted(sizes.items()):
        name = (
            "recomputed" if count == plan.blocks else f"{count} of {plan.blocks} blocks recomputed" if count else "kept"
        )
        chosen = " (this run)" if count == plan.recomputed_blocks else ""
        rows.append((f"activations, {name}{chosen}", "", "", size_text(size)))
    if plan.encoder:
        rows.append(("encoder stage, beside training in windows", "", "", size_text(plan.encoder)))
    rows.append(("Ascend device", "", "", size_text(plan.device())))
    for world_size in (2, 8):
        size = plan.device(world_size, zero_stage=1)
        rows.append((f"each of {world_size} Ascend devices, ZeRO stage 1", "", "", size_text(size)))
    rows.append(("host, while models are loaded", "", "", size_text(plan.loading)))
    return rows


def measured(settings: Settings) -> dict[str, float]:
    """For run.json: planned and measured peak so far in MB, of this process on the CPU, of the device on an NPU.

    And the number of blocks that are recomputed.
    """
    on_cpu = ms.get_context("device_target") == "CPU"
    plan = make_plan(settings, on_cpu)
    if on_cpu:
        predicted, peak = plan.process() / MB, peak_memory_mb()["training_process"]
    else:
        predicted, peak = plan.device() / MB, ms.runtime.max_memory_allocated() / MB
    return {"predicted_mb": predicted, "measured_mb": peak, "recomputed_blocks": plan.recomputed_blocks}
