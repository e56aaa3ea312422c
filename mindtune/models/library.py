"""mindone, imported in one place: the differences between its versions, and the config defaults of its classes."""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import io
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import mindspore as ms


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Keeps the garbage collector off. In imports it finds nothing and takes a quarter of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


with _no_collections(), contextlib.redirect_stdout(io.StringIO()):  # mindone prints which flash attention it found
    import mindone.diffusers
    import mindone.transformers
    from mindone.diffusers.training_utils import (  # noqa: F401  (imported from here by the other modules)
        TrainStep,
        pynative_no_grad,
    )

# mindspore prints a deprecation warning about mindone's code for every normalisation layer. Users cannot act on it.
ms.log._get_logger().addFilter(lambda record: "dtype_to_nptype" not in record.getMessage())

# mindone 0.4 moved its port of peft out of diffusers.
try:
    peft = importlib.import_module("mindone.peft")
    tuners_utils = importlib.import_module("mindone.peft.tuners.tuners_utils")
except ImportError:
    peft = importlib.import_module("mindone.diffusers._peft")
    tuners_utils = importlib.import_module("mindone.diffusers._peft.tuners.tuners_utils")
LoraConfig, BaseTunerLayer = peft.LoraConfig, tuners_utils.BaseTunerLayer


@lru_cache(None)
def config_defaults(class_name: str) -> dict[str, Any]:
    """Default values of the config keys of a class; empty for a class that mindone does not have.

    A published config lacks the keys that were added to its class later: Stable Diffusion 1.5's VAE has no
    scaling_factor.
    """
    cls = getattr(mindone.diffusers, class_name, None)
    if cls is not None:
        parameters = inspect.signature(cls.__init__).parameters.values()
        return {
            parameter.name: parameter.default
            for parameter in parameters
            if parameter.default is not inspect.Parameter.empty
        }
    cls = getattr(mindone.transformers, class_name, None)
    return cls.config_class().to_dict() if cls is not None and cls.config_class is not None else {}
