"""mindone, imported in one place: its versions' differences, and the defaults of its classes' configs."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
from functools import lru_cache
from typing import Any

import mindspore as ms

with contextlib.redirect_stdout(io.StringIO()):  # mindone prints which flash attention it found
    import mindone.diffusers
    import mindone.transformers
    from mindone.diffusers.training_utils import (  # noqa: F401  (everybody else has them from here)
        TrainStep,
        pynative_no_grad,
    )

# Loading prints a deprecation warning of mindspore about mindone's code for every normalisation layer: nothing a user can mend.
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
    """What a class takes for the keys that its config.json lacks; empty for a class that mindone does not have.

    Published configs lack every key that was added to the class after them: Stable Diffusion 1.5's VAE has no scaling_factor.
    """
    cls = getattr(mindone.diffusers, class_name, None)
    if cls is not None:
        parameters = inspect.signature(cls.__init__).parameters.values()
        return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
    cls = getattr(mindone.transformers, class_name, None)
    return cls.config_class().to_dict() if cls is not None and cls.config_class is not None else {}
