"""A parser whose flags are declared with help, bounds, and whether their value may change when a run is resumed.

    parser = Parser(__doc__)
    training_flags.model(parser, pipeline="FLUX.1")
    parser.add("lora_rank", type=int, default=4, minimum=1, help="Rank of the LoRA matrices.")
    args = parser.parse_args(argv)

The flags that training scripts share are declared once, in the groups of `data_flags`, `training_flags` and
`output_flags`. The tables in docs/ are written from the same declarations by `python docs/flags.py`.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple, Optional

from mindtune.cli import UserError

# Flags of diffusers' scripts that have no effect here, and why.
NO_EFFECT = {
    "allow_tf32": "a CUDA setting; matrix products run in the dtype that --mixed_precision names",
    "enable_xformers_memory_efficient_attention": "a CUDA kernel; on Ascend mindone uses its own flash attention",
    "enable_npu_flash_attention": "mindone uses flash attention on Ascend without a flag",
    "set_grads_to_none": "a PyTorch setting; MindSpore returns gradients and keeps none between updates",
}


class Flag(NamedTuple):
    """The bounds of a flag (None: no bound), and whether a resumed run may change its value."""

    minimum: Optional[float]
    above: Optional[float]
    below: Optional[float]
    may_change: bool


class Values(argparse.Namespace):
    """The values of all flags, read-only."""

    def __init__(self, values: dict[str, Any], declared: dict[str, Flag], defaults: dict[str, Any]) -> None:
        self.__dict__.update(values, _declared=declared, _defaults=defaults)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"args.{name}: flags are never changed; use a local variable")

    def select(self, cls: type, **more: Any) -> Any:
        """An instance of `cls` from `more` and the flags with the names of its parameters; the others keep defaults."""
        names = [name for name in inspect.signature(cls).parameters if name in self._declared and name not in more]
        return cls(**{name: getattr(self, name) for name in names}, **more)

    def recorded(self) -> dict[str, Any]:
        """Every flag with its value, for run.json. The hub's token is left out."""
        return {name: None if name == "hub_token" else getattr(self, name) for name in self._declared}

    def fixed(self) -> dict[str, Any]:
        """The flags that must have the same values when the run is resumed, for an exact continuation."""
        return {name: getattr(self, name) for name, flag in self._declared.items() if not flag.may_change}

    def defaults(self) -> dict[str, Any]:
        """The default of every flag: what a checkpoint of an older version, which lacks the flag, was trained with."""
        return self._defaults


class _HelpFormatter(argparse.HelpFormatter):
    """Adds the default value to help lines that do not describe it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        is_unset = default is None or default is False or default == [] or default == argparse.SUPPRESS
        return action.help if is_unset or "Default:" in action.help else f"{action.help} Default: %(default)s."


class Parser(argparse.ArgumentParser):
    """argparse with sections, bounds, and checks that read several flags. `doc` is the script's docstring."""

    def __init__(self, doc: str) -> None:
        super().__init__(description=doc.split("\n")[0], formatter_class=_HelpFormatter, allow_abbrev=False)
        self.declared: dict[str, Flag] = {}
        self.checks: list[Callable[[Values], None]] = []
        self._section: Any = self

    def section(self, title: str) -> None:
        """Starts a section of --help, with the flags that are added after it."""
        self._section = self.add_argument_group(title)

    def add(
        self,
        name: str,
        *aliases: str,
        minimum: Optional[float] = None,
        above: Optional[float] = None,
        below: Optional[float] = None,
        may_change: bool = False,
        **settings: Any,
    ) -> None:
        """Declares --name. `settings` are argparse's; a default of False makes a switch.

        Values must be at least `minimum`, above `above` and below `below`. With `may_change`, a resumed run may have
        another value and is still the exact continuation of the run that was stopped.
        """
        if settings.get("default") is False:
            settings = {**settings, "action": "store_true"}
        self._section.add_argument(f"--{name}", *(f"--{alias}" for alias in aliases), **settings)
        self.declared[name] = Flag(minimum, above, below, may_change)

    def parse_args(self, args: Optional[Sequence[str]] = None, namespace: None = None) -> Values:
        """The values of all flags, after all checks. Raises UserError."""
        defaults = {name: self.get_default(name) for name in self.declared}
        values = Values(vars(super().parse_args(args)), self.declared, defaults)
        for name, why in NO_EFFECT.items():
            if getattr(values, name, False):
                print(f"--{name}: {why}")
        for name, flag in self.declared.items():
            check_value(name, getattr(values, name), flag)
        for check in self.checks:
            check(values)
        return values


def check_value(name: str, value: Any, flag: Flag) -> None:
    """Raises UserError if a value is outside the bounds of its flag, or if the name of a model is empty."""
    if value == "" and name.endswith("_name_or_path"):
        raise UserError(f"--{name}: is empty; was a shell variable not set? Give a value or leave the flag out.")
    if value is None:
        return
    if flag.minimum is not None and not value >= flag.minimum:
        raise UserError(f"--{name} {value}: must be at least {flag.minimum}.")
    if flag.above is not None and not value > flag.above:
        raise UserError(f"--{name} {value}: must be above {flag.above}.")
    if flag.below is not None and not value < flag.below:
        raise UserError(f"--{name} {value}: must be below {flag.below}.")


def boolean(text: str) -> bool:
    """The value of a flag that takes true or false. Raises argparse.ArgumentTypeError for anything else."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return text.lower() in ("true", "1", "yes")
