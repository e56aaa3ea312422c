"""What a LoRA holds, by block, and what a reduction keeps of it, by kind of layer: as tables, and as an image."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mindtune.files import write_atomically
from mindtune.models.lora_edit import Pair, Reduced, norm

_BLOCK = re.compile(r"(.*?(?:blocks|layers))\.(\d+)\.")
OTHERS = "other layers"
_ORDER = ("transformer_blocks", "single_transformer_blocks", "text_model.encoder.layers", "")  # the last: OTHERS


class Block(NamedTuple):
    """The adapted layers of one block. `name` is without the model's prefix; `norm` is that of all their B A."""

    model: str
    name: str
    layers: int
    ranks: list[int]
    alphas: list[float]
    norm: float


# ---- blocks --------------------------------------------------------------------------------------


def blocks(pairs: dict[str, Pair], alphas: dict[str, float]) -> list[Block]:
    """Every block with adapted layers, by model, type and number; layers outside blocks last."""
    groups: dict[tuple, list[str]] = {}
    for layer in pairs:
        model, _, name = layer.partition(".")
        match = _BLOCK.match(name)
        stack, number = (match[1], int(match[2])) if match else ("", 0)
        groups.setdefault((model != "transformer", _ORDER.index(stack), number, model), []).append(layer)
    found = []
    for (_, place, number, model), layers in sorted(groups.items()):
        squares = sum(norm(pairs[layer]) ** 2 for layer in layers)
        found.append(
            Block(
                model,
                f"{_ORDER[place]}.{number}" if _ORDER[place] else OTHERS,
                len(layers),
                sorted({len(pairs[layer].a) for layer in layers}),
                sorted({alphas[layer] for layer in layers}),
                float(np.sqrt(squares)),
            )
        )
    return found


def block_table(found: Sequence[Block]) -> str:
    """One line per block, and one per model with all of its blocks."""
    rows = [("block", "layers", "rank", "alpha", "norm")]
    for model in dict.fromkeys(block.model for block in found):
        ours = [block for block in found if block.model == model]
        rows += [_row(block.name, [block]) for block in ours]
        rows.append(_row(f"{model}, all", ours))
    return _aligned(rows)


def _row(name: str, ours: list[Block]) -> tuple[str, ...]:
    ranks = {rank for block in ours for rank in block.ranks}
    alphas = {alpha for block in ours for alpha in block.alphas}
    total = np.sqrt(sum(block.norm**2 for block in ours))
    return name, str(sum(block.layers for block in ours)), _numbers(ranks), _numbers(alphas), f"{total:.4g}"


def _numbers(values: Iterable[float]) -> str:
    """Up to three different values, or the smallest and the largest: "4, 8, 16", "1 to 32"."""
    ordered = sorted(set(values))
    texts = list(dict.fromkeys(f"{value:.4g}" for value in ordered))
    return ", ".join(texts) if len(texts) <= 3 else f"{texts[0]} to {texts[-1]}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table in columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(f"{cell:{'<' if i == 0 else '>'}{width}}" for i, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    )


# ---- kept energy ---------------------------------------------------------------------------------


def energy_table(reduced: dict[str, Reduced]) -> str:
    """The ranks and the kept share of the squared singular values, of every kind of layer and of all together."""
    groups: dict[str, list[Reduced]] = {}
    for layer, result in reduced.items():
        groups.setdefault(_pattern(layer), []).append(result)
    rows = [("layer", "count", "rank", "kept energy")]
    rows += [_energy_row(name, results) for name, results in groups.items()]
    rows.append(_energy_row("all", list(reduced.values())))
    return _aligned(rows)


def _energy_row(name: str, results: list[Reduced]) -> tuple[str, ...]:
    kept, energy = sum(result.kept for result in results), sum(result.energy for result in results)
    ranks = _numbers(len(result.pair.a) for result in results)
    return name, str(len(results)), ranks, f"{kept / energy if energy else 1:.2%}"


def patterns(names: Iterable[str]) -> list[str]:
    """Names with * for the number of the block, each once, with how many there are: "layers.*.bias (12)"."""
    counts = Counter(map(_pattern, names))
    return [f"{name} ({count})" if count > 1 else name for name, count in counts.items()]


def _pattern(name: str) -> str:
    return re.sub(r"(?<=blocks\.|layers\.)\d+", "*", name)


# ---- image ---------------------------------------------------------------------------------------


def plot(path: Path, title: str, found: Sequence[Block]) -> None:
    """Writes a PNG with the norm, the ranks and alphas, and the number of layers of every block."""
    from matplotlib.figure import Figure  # takes a third of a second to import

    figure = Figure(figsize=(max(7, 1.5 + 0.15 * len(found)), 7), layout="constrained")
    norms, ranks, layers = figure.subplots(3, sharex=True, height_ratios=(3, 2, 2))
    for index, (label, places) in enumerate(_parts(found)):
        ours = [found[place] for place in places]
        norms.bar(places, [block.norm for block in ours], color=f"C{index}", label=label)
        layers.bar(places, [block.layers for block in ours], color=f"C{index}")
    for name, style, size, values in (
        ("rank", "ok", 4, [block.ranks for block in found]),
        ("alpha", "xC3", 7, [block.alphas for block in found]),
    ):
        points = [(place, value) for place, several in enumerate(values) for value in several]
        ranks.plot(*zip(*points), style, label=name, markersize=size)
    ranks.margins(y=0.15)
    ranks.set_ylim(bottom=min(0, *(alpha for block in found for alpha in block.alphas)))
    norms.set_title(title, fontsize=10)
    norms.set_ylabel("norm of alpha / rank · B A")
    ranks.set_ylabel("rank, alpha")
    layers.set_ylabel("adapted layers")
    layers.set_xlabel("block")
    layers.set_xticks(range(len(found)), [_short(block) for block in found], rotation=90, fontsize=7)
    layers.margins(x=0.01)
    layers.yaxis.get_major_locator().set_params(integer=True)
    for axes in (norms, ranks):
        axes.legend(fontsize=8, frameon=False)
    for axes in (norms, ranks, layers):
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda beside: figure.savefig(beside, format="png", dpi=110))


def _parts(found: Sequence[Block]) -> Iterator[tuple[str, list[int]]]:
    """(label, places in `found`) of every kind of block."""
    parts: dict[str, list[int]] = {}
    for place, block in enumerate(found):
        parts.setdefault(f"{block.model}: {block.name.rpartition('.')[0] or block.name}", []).append(place)
    yield from parts.items()


def _short(block: Block) -> str:
    """The number of a block as a tick."""
    return block.name.rpartition(".")[2] if block.name != OTHERS else "other"
