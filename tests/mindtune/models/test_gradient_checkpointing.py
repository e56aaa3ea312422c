"""Which blocks gradient checkpointing recomputes: those that a gradient passes, as the memory plan counts them."""

import pytest
from pipeline_cases import tiny_pipeline

from mindtune.models import controlnets, loading, precision
from mindtune.models.gradient_checkpointing import blocks_with_gradient, recompute_blocks
from mindtune.run import memory
from mindtune.run.activations import recomputable

TYPES = {
    "FluxTransformerBlock": "double",
    "FluxSingleTransformerBlock": "single",
    "CLIPEncoderLayer": "clip",
    "ResnetBlock2D": "residual",
    "BasicTransformerBlock": "attention",
}


@pytest.fixture(scope="module")
def models(tiny_flux, tmp_path_factory):
    """models(system): pipeline directory, and the models that a script gives to `recompute_blocks`."""
    full = precision.resolve_precision("no")
    done = {}

    def load(system):
        if system == "flux_lora":
            return tiny_flux, [loading.load_model(tiny_flux, name, full) for name in ("transformer", "text_encoder")]
        if system == "flux_controlnet":
            frozen = loading.load_model(tiny_flux, "transformer", full)
            return tiny_flux, [controlnets.flux_controlnet(tiny_flux, 2, 1), frozen]
        root = tiny_pipeline(tmp_path_factory, {"controlnet": "sd15", "controlnet_sdxl": "sdxl"}[system])
        unet = loading.load_model(root, "unet", full)
        return root, [controlnets.unet_controlnet(unet, 0), unet]

    def get(system):
        if system not in done:
            done[system] = load(system)
        return done[system]

    return get


@pytest.mark.parametrize("system", ["flux_lora", "flux_controlnet", "controlnet", "controlnet_sdxl"])
def test_the_plan_has_the_same_blocks_in_the_same_order(models, system):
    root, cells = models(system)
    settings = memory.Settings(
        system, root, train_text_encoder=True, num_double_layers=2, num_single_layers=1, gradient_checkpointing=True
    )
    planned = memory._blocks(settings)
    types = [TYPES[type(cell).__name__] for cell in blocks_with_gradient(*cells)]
    assert types == [block.type for block in planned if block.type != "condition"]
    assert memory.recomputed_blocks(settings) == recomputable(planned) == len(types)


def test_the_first_blocks_are_recomputed(models, monkeypatch):
    _, cells = models("flux_controlnet")
    blocks = blocks_with_gradient(*cells)
    assert blocks[:3] == [*cells[0].transformer_blocks, *cells[0].single_transformer_blocks]
    assert cells[1].transformer_blocks[0] not in blocks  # the frozen model's first block gets no gradient
    recomputed = []
    for cls in {type(block) for block in blocks}:
        monkeypatch.setattr(cls, "recompute", lambda block: recomputed.append(block))
    recompute_blocks(4, *cells)
    assert recomputed == blocks[:4]
