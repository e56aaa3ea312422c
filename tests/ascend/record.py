"""Reads what the stand-ins wrote down in a rehearsal: operators with their dtypes and shapes, copies, updates."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

FLASH = "aclnnFlashAttentionScore"
CASTS = ("aclnnCast",)
TRANSPOSES = ("aclnnPermute", "aclnnTranspose", "aclopTranspose")


class Call(NamedTuple):
    """An operator ("aclnnAdd", or "aclopBiasAdd" for the older kind) and the dtypes of its tensors."""

    name: str
    dtypes: frozenset[str]


class Record:
    """The calls of a rehearsal, in one list per update; the last list is what came after the last update."""

    def __init__(self, path: Path):
        self.updates: list[list[Call]] = [[]]
        for line in path.read_text().splitlines():
            name, *_ = line.split(" ", 1)
            if name == "update":
                self.updates.append([])
            elif not name.startswith("copy"):
                self.updates[-1].append(Call(name, frozenset(re.findall(r" \(*([a-z]+\d*)\[", line))))

    def calls(self) -> list[Call]:
        return [call for update in self.updates for call in update]

    def names_with(self, *dtypes: str) -> list[str]:
        """Names of the operators that had a tensor of one of these dtypes."""
        return sorted({call.name for call in self.calls() if call.dtypes & set(dtypes)})

    def old_operators(self) -> set[str]:
        """Operators that are called the older way, without an aclnn function."""
        return {call.name.removeprefix("aclop") for call in self.calls() if call.name.startswith("aclop")}

    def count(self, update: int) -> dict[str, int]:
        """Kernels, casts, transposes, old operators and flash attentions of one update."""
        names = Counter(call.name for call in self.updates[update])
        return {
            "kernels": sum(names.values()),
            "casts": sum(names[name] for name in CASTS),
            "transposes": sum(names[name] for name in TRANSPOSES),
            "old": sum(count for name, count in names.items() if name.startswith("aclop")),
            "flash": sum(count for name, count in names.items() if name.startswith(FLASH)),
        }
