"""Tiny Stable Diffusion pipelines, and the messages about pipelines that are not accepted."""

import pytest
from conftest import load_script

from mindtune.cli import UserError
from mindtune.models.pipeline_checks import check_pipeline
from mindtune.models.pipelines import FLUX_COMPONENTS
from mindtune.models.weights import weight_files

_pipelines = {}


def tiny_pipeline(tmp_path_factory, name):
    """A complete pipeline, made once: sd15 or sdxl. A test that changes it needs a copy."""
    if name not in _pipelines:
        _pipelines[name] = tmp_path_factory.mktemp(name) / name
        getattr(load_script("examples/tiny/make_tiny_pipeline.py"), f"make_{name}")(_pipelines[name])
    return _pipelines[name]


def error_message(root, components=FLUX_COMPONENTS, **options):
    """The message of the error that `check_pipeline` raises."""
    with pytest.raises(UserError) as error:
        check_pipeline(root, components, **options)
    return str(error.value)


def broken(root, variant=None):
    """The problems in the message about a pipeline that is not complete."""
    head, *lines, tail = error_message(root, variant=variant).splitlines()
    assert head == f"--pretrained_model_name_or_path {root}: not a complete pipeline:"
    assert tail.startswith("Copy or download it again")
    return [line.strip() for line in lines]


def unsupported(root, components=FLUX_COMPONENTS, **options):
    """The problems in the message about a complete pipeline that cannot be trained."""
    head, *lines, tail = error_message(root, components, **options).splitlines()
    assert head == f"--pretrained_model_name_or_path {root}: cannot be trained by this script:"
    assert tail == "docs/models.md lists the published models that can."
    return [line.strip() for line in lines]


def rename_weights(root, name, variant):
    """Renames a component's weight file to that of a variant."""
    (path,) = weight_files(root, name)
    path.rename(path.with_name(path.name.replace(".safetensors", f".{variant}.safetensors")))
