"""Trains a narrow VAE of FLUX's architecture on the data of shapes.py. Needs PyTorch.

    pip install torch==2.13.0 diffusers==0.35.2
    python examples/tiny/pretrain_tiny_vae.py OUT --steps 4000

Expect about 20 minutes on two cores. Writes OUT/config.json and OUT/diffusion_pytorch_model.safetensors, which
mindone's AutoencoderKL reads: 16 latent channels, 4 levels, no quant convolutions. An interrupted run resumes from
OUT/state.pt, saved every 200 steps. This is the only script that uses PyTorch, because MindSpore's convolution
gradients take ten times as long on the CPU.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

sys.path.insert(0, str(Path(__file__).resolve().parent))
from shapes import COLOURS, render, sample_scene

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 16,
    "norm_num_groups": 8,
    "sample_size": 64,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
    "mid_block_add_attention": True,
}


def batch(seed, step, size, side):
    """float32 [size, 3, side, side] in [-1, 1]. Depends on seed and step only, so that a resumed run continues exactly.

    Shapes lie anywhere in the image and every second one is checkered, so that the VAE can encode what the transformer
    never saw.
    """
    rng = np.random.default_rng([seed, step])
    scenes = [sample_scene(rng, "train", anywhere=True) for _ in range(size)]
    names = list(COLOURS)
    scenes[::2] = [scene._replace(second=names[rng.integers(len(names))]) for scene in scenes[::2]]
    images = [np.asarray(render(scene, side)) for scene in scenes]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", metavar="OUT", type=Path, help="Directory to write to.")
    parser.add_argument("--steps", type=int, default=4000, help="Total updates. Default: 4000.")
    parser.add_argument("--batch_size", type=int, default=24, help="Images per update. Default: 24.")
    parser.add_argument("--side", type=int, default=64, help="Side of the images in pixels. Default: 64.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of all random draws. Default: 0.")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    vae = AutoencoderKL(**CONFIG)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    first = 0
    state = args.out / "state.pt"
    if state.is_file():
        saved = torch.load(state)
        vae.load_state_dict(saved["vae"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters; from step {first}", flush=True)

    started = time.time()
    for step in range(first, args.steps):
        rate = 2e-3 * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        pixels = batch(args.seed, step, args.batch_size, args.side)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(args.seed * 1_000_003 + step))
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = (decoded - pixels).abs().mean() + (decoded - pixels).square().mean()
        # A small KL term keeps the latents from growing.
        loss = error + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            partial = state.with_suffix(".partial")
            torch.save({"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, partial)
            partial.replace(state)
            pace = (time.time() - started) / (step + 1 - first)
            print(f"step {step + 1}: error {error.item():.4f}, {pace:.2f} s per step", flush=True)

    with torch.no_grad():
        latents = torch.cat([vae.encode(batch(args.seed + 1, k, 64, args.side)).latent_dist.sample() for k in range(8)])
    # These factors give the transformer latents of mean 0 and standard deviation 1, as FLUX's do.
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4)
    )
    vae.save_pretrained(args.out)
    print(json.dumps({name: vae.config[name] for name in ("shift_factor", "scaling_factor")}))


if __name__ == "__main__":
    main()
