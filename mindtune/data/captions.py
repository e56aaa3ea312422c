"""Captions that change from use to use: shuffled tags, empty captions, a trigger word."""

from __future__ import annotations

import re
from typing import Any, NamedTuple, Optional

from mindtune import rng


class Settings(NamedTuple):
    """How captions are used. The fields have the names of the flags; a `Concept` has them too."""

    caption_dropout: float = 0.0
    shuffle_tags: bool = False
    keep_tags: int = 0
    tag_orders: int = 8
    trigger_word: Optional[str] = None


UNCHANGED = Settings()


def with_trigger_word(caption: Optional[str], word: Optional[str]) -> Optional[str]:
    """The caption with the trigger word as its first tag, unless it contains the word already."""
    if not word or re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption or ""):
        return caption
    return f"{word}, {caption}" if caption else word


def variants(caption: str, settings: Any, seed: int) -> list[str]:
    """Every form in which `settings`, a `Settings` or a `Concept`, may use a caption: these are encoded.

    With --shuffle_tags at most --tag_orders forms, with --caption_dropout also the empty caption.
    """
    found = [caption]
    if settings.shuffle_tags:
        found = [reorder_tags(caption, settings, seed, order) for order in range(settings.tag_orders)]
    return list(dict.fromkeys(found + ([""] if settings.caption_dropout else [])))


def reorder_tags(caption: str, settings: Any, seed: int, order: int) -> str:
    """The caption with its tags, which commas separate, in the random order of number `order`.

    The first --keep_tags tags stay where they are, and so does a trigger word before them.
    """
    tags = _tags(caption)
    trigger = _tags(settings.trigger_word or "")
    first = settings.keep_tags + (len(trigger) if caption.startswith(settings.trigger_word or " ") else 0)
    permutation = rng.generator(seed, f"tag order/{caption}", order).permutation(len(tags[first:]))
    return ", ".join([*tags[:first], *(tags[first:][i] for i in permutation)])


def _tags(caption: str) -> list[str]:
    return [tag.strip() for tag in caption.split(",") if tag.strip()]
