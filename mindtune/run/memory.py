"""How much memory a run needs, computed from configs and flags: no weights are read, and none are allocated.

Weights, gradients and optimizer state are counted exactly. Activations and what the CPU runtime adds are estimates, in
`cpu_memory` and `ascend_memory`; benchmarks/memory_plan.py compares the plan with peaks that were measured on a CPU and
simulated for Ascend. On an NPU we measured nothing of this.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple, Optional, Union

import mindspore as ms

from mindtune.data import buckets
from mindtune.encode.estimate import CLIP_TOKENS, ITEMSIZE
from mindtune.encode.jobs import vae_batch
from mindtune.models.configs import read_config
from mindtune.models.lora_layouts import KINDS
from mindtune.models.lora_settings import DEFAULT_TARGETS
from mindtune.optim.optimizers import state_bytes
from mindtune.run import adapters, ascend_memory, cpu_memory
from mindtune.run.activations import Block, clip_blocks, flux_blocks, recomputable, unet_controlnet_blocks
from mindtune.run.parameters import Part, frozen_part, largest_int8_weight, trained_shapes

MB, GB = 1 << 20, 1 << 30


class Settings(NamedTuple):
    """What determines the memory of a run. The fields that are flags have the flag's name and meaning.

    Some fields apply only to some systems: those of adapters to LoRAs, the text encoder and prior preservation to
    flux_lora, the numbers of blocks to flux_controlnet, `base_precision` and `max_sequence_length` to FLUX.1.
    """

    system: str  # flux_lora, flux_kontext, flux_control, flux_controlnet, controlnet or controlnet_sdxl
    root: Path  # the folder of the pipeline; its configs are enough
    controlnet: Optional[Path] = None  # the folder of an existing ControlNet that training starts from
    mixed_precision: str = "no"
    mindspore_mode: int = 0
    resolution: Union[int, list[int]] = 512
    aspect_ratio_buckets: Optional[str] = None
    train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    gradient_checkpointing_blocks: Optional[int] = None
    fit: bool = False
    device_memory_gb: float = 64
    cache_latents: bool = False
    optimizer: str = "adamw"
    use_8bit_adam: bool = False
    offload_optimizer: bool = False
    use_ema: bool = False
    base_precision: str = "same"
    max_sequence_length: int = 512
    adapter: str = "lora"
    lora_rank: int = 4
    lokr_factor: int = -1
    lora_layers: Optional[str] = None
    lora_blocks: Optional[str] = None
    lora_rank_pattern: Optional[str] = None
    train_text_encoder: bool = False
    with_prior_preservation: bool = False
    train_norm_layers: bool = False
    fill: bool = False
    num_double_layers: int = 4
    num_single_layers: int = 4
    streaming: bool = False
    encode_window: Optional[int] = None
    cache_limit_gb: Optional[float] = None

    @property
    def flux(self) -> bool:
        return self.system.startswith("flux")

    @property
    def lora(self) -> bool:
        return self.system in DEFAULT_TARGETS

    @property
    def encodes_conditions(self) -> bool:
        """Whether the VAE encodes condition images too, before training."""
        return self.system in ("flux_controlnet", "flux_kontext", "flux_control") and not self.fill

    @property
    def base(self) -> str:
        """The component that training builds on."""
        return "transformer" if self.flux else "unet"

    @property
    def int8(self) -> bool:
        return self.flux and self.base_precision == "int8"

    @property
    def windows(self) -> bool:
        """Whether the encoder stage may run during training: see `mindtune.encode.windows`."""
        return bool(self.streaming or self.encode_window or self.cache_limit_gb)

    def largest_crop(self) -> tuple[int, int]:
        """(height, width) in pixels of the largest training image."""
        return buckets.Settings(self.resolution, self.aspect_ratio_buckets).largest()


class Plan(NamedTuple):
    """The memory of a run in bytes.

    `kept` and `recomputed` are the activations without gradient checkpointing and with all of the `blocks` recomputed,
    `activations` those of this run, which recomputes `recomputed_blocks`. `encoder` is what the encoder stage takes
    beside training, if data is encoded in windows. `loading` is the host's peak while models are
    loaded, `runtime` what the CPU runtime adds.
    """

    parts: list[Part]
    gradients: int
    optimizer: int
    host_optimizer: int
    average: int
    kept: int
    recomputed: int
    activations: int
    blocks: int
    recomputed_blocks: int
    encoder: int
    loading: int
    runtime: int

    def device(self, world_size: int = 1, zero_stage: int = 0) -> int:
        """Bytes per device under data parallelism. ZeRO stage 1 shards the optimizer state over the devices."""
        state = self.optimizer // world_size if zero_stage == 1 else self.optimizer
        training = sum(part.size for part in self.parts) + self.gradients + state + self.average + self.activations
        return training + self.encoder

    def process(self) -> int:
        """The peak of the training process on the CPU."""
        return self.device() - self.encoder + self.host_optimizer + self.runtime


# ---- the plan ------------------------------------------------------------------------------------


def make_plan(settings: Settings, on_cpu: bool = False) -> Plan:
    """The plan of a run on an NPU, or with `on_cpu` on this machine, where bfloat16 is computed in float32."""
    precision = settings.mixed_precision
    graph_mode = settings.mindspore_mode == 0
    itemsize = 4 if on_cpu and precision == "bf16" else ITEMSIZE[precision]

    trained = trained_shapes(settings)
    count = sum(map(math.prod, trained))
    lora = settings.lora
    # A DoRA has a frozen vector of the size of every magnitude: the norms of the weights.
    dora = adapters.adapted_layers(settings).values() if settings.adapter == "dora" else ()
    norms = sum(layer.outputs for layer in dora)
    parts = [frozen_part(settings, settings.base, settings.int8)]
    if lora and settings.train_text_encoder:
        parts.append(frozen_part(settings, "text_encoder"))
    parts.append(Part(KINDS[settings.adapter][0] if lora else "controlnet", count, "float32", 4 * (count + norms)))
    if not settings.cache_latents or settings.fill:  # masked images are encoded in the step
        parts.append(frozen_part(settings, "vae"))

    blocks = _blocks(settings)
    everything, chosen = recomputable(blocks), recomputed_blocks(settings)
    if on_cpu:
        sizes = [cpu_memory.activation_bytes(blocks, n, itemsize, graph_mode) for n in (0, everything, chosen)]
    else:
        step = ascend_memory.Step(
            itemsize,
            graph_mode,
            [math.prod(shape) for shape in trained],
            largest_int8_weight(settings),
            settings.use_8bit_adam,
        )
        sizes = [ascend_memory.activation_bytes(blocks, n, step) for n in (0, everything, chosen)]
    state = state_bytes(trained, settings.optimizer, settings.use_8bit_adam)
    return Plan(
        parts=parts,
        gradients=4 * count * (2 if settings.gradient_accumulation_steps > 1 else 1),
        optimizer=0 if settings.offload_optimizer else state,
        host_optimizer=state if settings.offload_optimizer else 0,
        average=4 * count if settings.use_ema else 0,
        kept=sizes[0],
        recomputed=sizes[1],
        activations=sizes[2],
        blocks=everything,
        recomputed_blocks=chosen,
        encoder=_encoder_bytes(settings, itemsize) if settings.windows else 0,
        loading=int(1.01 * sum(part.size for part in parts)),
        runtime=cpu_memory.runtime_bytes(
            blocks, itemsize, settings.mindspore_mode, settings.flux, count, largest_int8_weight(settings)
        )
        if on_cpu
        else 0,
    )


def recomputed_blocks(settings: Settings) -> int:
    """How many blocks are recomputed. With `fit`, as few as fit in `device_memory_gb`, or all if nothing fits."""
    count = recomputable(_blocks(settings))
    if settings.fit:
        limit = settings.device_memory_gb * GB
        return next((n for n in range(count) if make_plan(_recompute(settings, n)).device() <= limit), count)
    if not settings.gradient_checkpointing:
        return 0
    return min(count, settings.gradient_checkpointing_blocks or count)


def _recompute(settings: Settings, count: int) -> Settings:
    return settings._replace(fit=False, gradient_checkpointing=count > 0, gradient_checkpointing_blocks=count or None)


def encode_peak(settings: Settings) -> int:
    """Peak of the encoder stage in bytes: its largest text encoder, or the VAE with the activations of one image."""
    on_cpu = ms.get_context("device_target") == "CPU"
    return _encoder_bytes(settings, 4 if on_cpu else ITEMSIZE[settings.mixed_precision]) + (
        cpu_memory.PROCESS if on_cpu else 0
    )


def _encoder_bytes(settings: Settings, itemsize: int) -> int:
    root = settings.root
    names = ["text_encoder"] if settings.system == "controlnet" else ["text_encoder", "text_encoder_2"]
    sizes = []
    for name in names:  # one encoder is in memory at a time
        int8 = settings.int8 and read_config(root, name)["architectures"] == ["T5EncoderModel"]
        sizes.append(frozen_part(settings, name, int8).size)
    # The largest activations of the VAE are those of its first level, at the image's own size; it needs six at a time.
    crop = settings.largest_crop()
    elements = 6 * vae_batch(crop) * math.prod(crop) * read_config(root, "vae")["block_out_channels"][0]
    sizes.append(frozen_part(settings, "vae").size + itemsize * elements)
    return max(sizes)


def _blocks(settings: Settings) -> list[Block]:
    """The blocks that a gradient passes, for images of the largest size."""
    config = read_config(settings.root, settings.base)
    height, width = settings.largest_crop()
    factor = 2 ** (len(read_config(settings.root, "vae")["block_out_channels"]) - 1)
    rows, columns = height // factor, width // factor
    batch = settings.train_batch_size
    if not settings.flux:
        return unet_controlnet_blocks(config, batch, (rows, columns), (height, width), CLIP_TOKENS)
    tokens = {"image_tokens": rows * columns // 4, "text_tokens": settings.max_sequence_length}
    layers = (config["num_layers"], config["num_single_layers"])
    if settings.system == "flux_kontext":
        tokens["image_tokens"] *= 2  # the image and its source
    if settings.lora:
        batch = 2 * batch if settings.with_prior_preservation else batch
        blocks = flux_blocks(config, layers, batch, **tokens, trained=False)
        if settings.train_text_encoder:
            blocks += clip_blocks(read_config(settings.root, "text_encoder"), batch)
        rows = batch * tokens["image_tokens"], batch * tokens["text_tokens"], batch * CLIP_TOKENS
        return adapters.with_adapters(
            blocks, settings.adapter, adapters.adapted_layers(settings), settings.lokr_factor, rows
        )
    own = (settings.num_double_layers, settings.num_single_layers)
    if settings.controlnet:
        existing = read_config(settings.controlnet.parent, settings.controlnet.name)
        own = (existing["num_layers"], existing["num_single_layers"])
    frozen = (max(0, layers[0] - 1), layers[1])  # the ControlNet's residuals enter after the first block
    controlnet = flux_blocks(config, own, batch, **tokens, trained=True)
    return controlnet + flux_blocks(config, frozen, batch, **tokens, trained=False)
