"""Seeded random weights in the official checkpoint layout: to try the pack, not for pictures.

    python tools/run.py demo_model.random_checkpoint OUT.safetensors [--size tiny]

Shapes come from the host's own classes and the pack's.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import nn

from cat_diffusion.cat_core import weights
from cat_diffusion.cat_core.config import (
    HEAD_WIDTH,
    Architecture,
    RefAdapterConfig,
    SemInpainterConfig,
    unet_blocks,
)
from cat_diffusion.nodes.host import modules


@dataclass(frozen=True)
class CheckpointSize:
    """What differs between checkpoints of one kind."""

    unet_channels: int
    channel_mult: tuple[int, ...]  # by level, as are the next two
    transformer_depth: tuple[int, ...]
    unet_res_blocks: int  # a level
    unet_heads: int
    text_width: int
    text_layers: int
    vision_width: int
    vision_layers: int  # of SemInpainter as well
    clip_heads: int | None  # of CLIP and SemInpainter; None = as many as fit
    vae_channels: int
    vae_mult: tuple[int, ...]
    vae_res_blocks: int


SIZES = {
    # SD 1.5 with CLIP ViT-L/14.
    "full": CheckpointSize(
        unet_channels=320,
        channel_mult=(1, 2, 4, 4),
        transformer_depth=(1, 1, 1, 0),
        unet_res_blocks=2,
        unet_heads=8,
        text_width=768,
        text_layers=12,
        vision_width=1024,
        vision_layers=24,
        clip_heads=None,
        vae_channels=128,
        vae_mult=(1, 2, 4, 4),
        vae_res_blocks=2,
    ),
    # Runs in milliseconds.
    "tiny": CheckpointSize(
        unet_channels=32,
        channel_mult=(1, 2),
        transformer_depth=(1, 1),
        unet_res_blocks=1,
        unet_heads=4,
        text_width=24,
        text_layers=2,
        vision_width=32,
        vision_layers=2,
        clip_heads=4,
        vae_channels=32,
        vae_mult=(1, 1, 2, 2),
        vae_res_blocks=1,
    ),
}


def random_checkpoint(
    size: str = "tiny", seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, dict[str, torch.Tensor]], Architecture]:
    """Parts by name, and their architecture; a seed gives the same weights on any machine."""
    sizes = SIZES[size]
    with torch.device("meta"):  # shapes alone
        networks = _stock_networks(sizes)
        architecture = _architecture(sizes, networks["unet"])
        networks |= weights.cat_modules(architecture)
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for part in weights.PREFIXES:
        parts[part] = {}
        for key, tensor in networks[part].state_dict().items():
            # SD 1.5 has no text projection; the host's class makes one all the same.
            if not key.startswith("text_projection"):
                parts[part][key] = _random(key, tensor.shape, generator).to(dtype)
    return parts, architecture


def _architecture(sizes: CheckpointSize, unet: nn.Module) -> Architecture:
    width = sizes.vision_width
    sem_inpainter = SemInpainterConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.clip_heads or width // HEAD_WIDTH,
        grid_size=16,
        text_size=sizes.text_width,
        text_intermediate_size=4 * sizes.text_width,
        spatial_intermediate_size=4 * width,
        global_intermediate_size=4 * width,
    )
    ref_adapter = RefAdapterConfig(
        visual_size=width,
        num_heads=sizes.unet_heads,
        blocks=unet_blocks(unet.state_dict()),
    )
    return Architecture(
        sem_inpainter=sem_inpainter,
        ref_adapter=ref_adapter,
        unet_num_heads=sizes.unet_heads,
        clip_text_num_heads=sizes.clip_heads,
        clip_vision_num_heads=sizes.clip_heads,
    )


def _stock_networks(sizes: CheckpointSize) -> dict[str, nn.Module]:
    """The parts that are no CAT-Diffusion's own, by name."""
    text = sizes.text_width
    vision = sizes.vision_width
    return {
        "unet": modules.unet(
            channels=sizes.unet_channels,
            multipliers=sizes.channel_mult,
            transformer_depth=sizes.transformer_depth,
            res_blocks=sizes.unet_res_blocks,
            heads=sizes.unet_heads,
            text_width=text,
        ),
        "vae": modules.vae(
            channels=sizes.vae_channels,
            multipliers=sizes.vae_mult,
            res_blocks=sizes.vae_res_blocks,
        ),
        "clip_text": modules.clip_text(
            width=text,
            layers=sizes.text_layers,
            heads=sizes.clip_heads or text // HEAD_WIDTH,
            mlp_width=4 * text,
        ),
        "clip_vision": modules.clip_vision(
            width=vision,
            layers=sizes.vision_layers,
            heads=sizes.clip_heads or vision // HEAD_WIDTH,
            mlp_width=4 * vision,
        ),
    }


def _random(key: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Norms near the identity, embeddings of 0.1, everything else scaled by its fan-in."""
    x = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return x * (0.1 if "embedding" in key else shape[1:].numel() ** -0.5)
    centre = 1.0 if _is_norm(key) and key.endswith("weight") else 0.0
    return 0.02 * x + centre


def _is_norm(key: str) -> bool:
    # The U-Net's GroupNorms have numbers for names.
    numbered = ".in_layers.0." in key or ".out_layers.0." in key or key.startswith("out.0.")
    return "norm" in key or numbered


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", metavar="OUT.safetensors", help="file to write")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=weights.DTYPES, default="fp16")
    arguments = parser.parse_args()
    print(f"Drawing {arguments.size} random weights ...", flush=True)
    parts, architecture = random_checkpoint(
        arguments.size, arguments.seed, weights.DTYPES[arguments.dtype]
    )
    weights.write_cat_weights(
        arguments.out,
        parts,
        architecture,
        licence="MIT",
        provenance=f"random weights, seed {arguments.seed}: not trained",
        overwrite=True,
    )
    return 0
