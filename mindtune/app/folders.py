"""The folders that the form may use, and the check that a command line stays in them.

A path is resolved first, with its links and `..`, and then has to be in the folders for its flag (`PATHS`). Text flags
(`TEXT`) are no paths. Any other flag whose value is text is refused: those that name a file with more paths in it
(--dataset_config, --jsonl_for_train, --validation_file), --hub_token, which the command line would show, and flags that
are new.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Callable, NamedTuple

from mindtune.cli import UserError, printable
from mindtune.flags.parser import Parser

# The folders that the value of a flag may be in. A relative path starts in the first of them that has it.
PATHS = {
    "instance_data_dir": ("data",),
    "train_data_dir": ("data",),
    "dataset_name": ("data",),
    "validation_image": ("data",),
    "validation_mask": ("data",),
    "pretrained_model_name_or_path": ("models",),
    "pretrained_vae_model_name_or_path": ("models",),
    "tokenizer_name": ("models",),
    "lora_model_name_or_path": ("models", "outputs"),
    "controlnet_model_name_or_path": ("models", "outputs"),
    "output_dir": ("outputs",),
    "class_data_dir": ("outputs",),  # the script writes missing class images there
    "cache_dir": ("outputs",),
}
# Paths that start in --output_dir.
IN_OUTPUT_DIR = ("resume_from_checkpoint", "logging_dir")
TEXT = {
    *("instance_prompt", "class_prompt", "validation_prompt", "lora_layers", "aspect_ratio_buckets", "timestep_shift"),
    *("image_column", "conditioning_image_column", "caption_column", "dataset_config_name", "revision", "variant"),
    *("hub_model_id", "trigger_word", "mask_column", "resolution"),
    *("lora_blocks", "lora_rank_pattern", "learning_rate_pattern"),
}


class Folders(NamedTuple):
    """The folders of data sets, which are only read, of base models, likewise, and of everything that is written."""

    data: Path
    models: Path
    outputs: Path

    def path(self, flag: str, text: str, kinds: tuple[str, ...]) -> Path:
        """The absolute path, without links and `..`, that `text` means for a flag. `kinds` are names of fields.

        Raises UserError if it is in none of these folders. The path need not exist.
        """
        roots = [getattr(self, kind).resolve() for kind in kinds]
        try:
            paths = [Path(root, text).resolve() for root in roots]
        except (ValueError, OSError, RuntimeError) as error:  # a null byte, a link to itself
            raise UserError(f"--{flag} {printable(text)}: is no path ({error}).") from None
        inside = [path for path, root in zip(paths, roots) if is_in(path, root)]
        if not inside:
            allowed = " or ".join(f"--{kind} {getattr(self, kind)}" for kind in kinds)
            raise UserError(f"--{flag} {printable(text)}: is outside of {allowed}, where the form may use files.")
        return next((path for path in inside if path.exists()), inside[0])

    def guarded(self, parser: Parser, values: dict[str, Any]) -> dict[str, Any]:
        """The values of a command line with paths as `path` returns them. Raises UserError for what is not allowed."""
        return {name: self._guarded(parser, values, name) for name in values}

    def _guarded(self, parser: Parser, values: dict[str, Any], name: str) -> Any:
        value = values[name]
        if name in PATHS and value is not None:
            if isinstance(value, list):
                return [str(self.path(name, text, PATHS[name])) for text in value]
            return str(self.path(name, value, PATHS[name]))
        if value == parser.get_default(name) or (name, value) == ("resume_from_checkpoint", "latest"):
            return value
        if name in IN_OUTPUT_DIR:
            output_dir = self.path("output_dir", values["output_dir"], PATHS["output_dir"])
            return str(self.path(name, str(output_dir / value), ("outputs",)))
        if name == "variant" and os.sep in value:  # it becomes part of a file's name
            raise UserError(f"--variant {printable(value)}: has a {os.sep}. Give a name such as fp16.")
        is_text = not isinstance(value, (bool, int, float))
        if is_text and name not in TEXT and not _choices(parser, name):
            raise UserError(f"--{name}: is not allowed in the form. Use the command line.")
        return value

    def check_links(self, values: dict[str, Any]) -> None:
        """Raises UserError if a link in a directory of `guarded` values leads out of the form's folder around it."""
        for name, kinds in PATHS.items():
            value = values.get(name) or []
            for path in map(Path, value if isinstance(value, list) else [value]):
                roots = [getattr(self, kind).resolve() for kind in kinds]
                require_closed(f"--{name}", path, next(root for root in roots if is_in(path, root)))


def _choices(parser: Parser, name: str) -> Any:
    (choices,) = (action.choices for action in parser._actions if action.dest == name)
    return choices


def is_in(path: Path, root: Path) -> bool:
    """Whether a path is below `root` or is `root`. Both are resolved."""
    return path == root or root in path.parents


def require_closed(flag: str, folder: Path, root: Path) -> None:
    """Raises UserError for a link in `folder`, at any depth and behind links to folders, that leads out of `root`."""
    root = root.resolve()
    waiting, seen = [str(folder)], {str(folder)}
    while waiting:
        for parent, folders, files in os.walk(waiting.pop()):
            for path in (os.path.join(parent, name) for name in (*folders, *files)):
                if not os.path.islink(path):
                    continue
                target = Path(os.path.realpath(path))  # which does not fail for a link to itself
                if not is_in(target, root):
                    raise UserError(
                        f"{flag} {printable(folder)}: the link {printable(path)} leads out of {root}, where the form "
                        "may use files. Replace it by a copy, or use the command line."
                    )
                if str(target) not in seen:
                    seen.add(str(target))
                    waiting.append(str(target))


def list_folders(root: Path, has: Callable[[list[str]], bool], depth: int) -> list[str]:
    """The folders below `root`, at most `depth` levels, for which `has(names of its files)` is true, from `root`."""
    found = []
    for parent, folders, files in os.walk(root):
        place = Path(parent).relative_to(root)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and len(place.parts) < depth)
        if place.parts and has(files):
            found.append(str(place))
    return found
