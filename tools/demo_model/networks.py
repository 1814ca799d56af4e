"""The demo model's networks: every part of CAT-Diffusion in small, with fresh weights.

They are built from the host's own classes. The visual grid is the real one (224 pixels, patches of
14); pictures are 128x128, latents 16x16.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from einops import repeat
from torch import nn

from cat_diffusion.cat_core import weights
from cat_diffusion.cat_core.config import (
    Architecture,
    RefAdapterConfig,
    SemInpainterConfig,
    unet_blocks,
)
from cat_diffusion.nodes.host import modules

SIZE = 128  # side of the demo model's pictures, in pixels
LATENT_SCALE = 0.18215  # Stable Diffusion's: latents are multiplied by it
_PATCH = 14
# Layers that end a residual branch start at zero, so that a fresh network passes its input on.
_BRANCH_ENDS = (
    "out_proj.",
    "fc2.",
    ".conv2.",
    ".proj_out.",
    ".out_layers.3.",
    ".to_out.0.",
    ".ff.net.2.",
)
# The U-Net's GroupNorms, which have numbers for names.
_NUMBERED_NORMS = (".in_layers.0.weight", ".out_layers.0.weight", ".out.0.weight")


@dataclass(frozen=True)
class Sizes:
    """How large the networks are.

    Attributes:
        vision: width of CLIP's vision part, SemInpainter and visual prompt.
        vision_layers: of CLIP's vision part, and of SemInpainter.
        text: width of CLIP's text part.
        heads: of all but CLIP's text part.
    """

    vision: int
    vision_layers: int
    text: int
    text_layers: int
    text_heads: int
    heads: int
    vae_channels: int
    vae_multipliers: tuple[int, ...]
    unet_channels: int
    unet_multipliers: tuple[int, ...]
    unet_transformers: tuple[int, ...]


DRAWN_SCENES = Sizes(
    vision=64,
    vision_layers=4,
    text=32,
    text_layers=2,
    text_heads=2,
    heads=4,
    vae_channels=32,
    vae_multipliers=(1, 1, 2, 2),
    unet_channels=64,
    unet_multipliers=(1, 2),
    unet_transformers=(0, 1),
)
PHOTOGRAPHS = Sizes(
    vision=160,
    vision_layers=4,
    text=64,
    text_layers=2,
    text_heads=2,
    heads=4,
    vae_channels=32,
    vae_multipliers=(1, 1, 2, 4),
    # Its norms have 32 groups: of 32 channels each would lose its own mean, and with it the colour.
    unet_channels=96,
    unet_multipliers=(1, 1, 2),
    unet_transformers=(0, 1, 1),
)


def networks(generator: torch.Generator, sizes: Sizes = DRAWN_SCENES) -> dict[str, nn.Module]:
    """Fresh modules by part (see weights.PREFIXES), in fp32."""
    parts = {
        "clip_text": modules.clip_text(
            width=sizes.text,
            layers=sizes.text_layers,
            heads=sizes.text_heads,
            mlp_width=4 * sizes.text,
        ),
        "clip_vision": modules.clip_vision(
            width=sizes.vision,
            layers=sizes.vision_layers,
            heads=sizes.heads,
            mlp_width=2 * sizes.vision,
            projection=sizes.text,
        ),
        "vae": modules.vae(
            channels=sizes.vae_channels, multipliers=sizes.vae_multipliers, res_blocks=1
        ),
        "unet": modules.unet(
            channels=sizes.unet_channels,
            multipliers=sizes.unet_multipliers,
            transformer_depth=sizes.unet_transformers,
            res_blocks=1,
            heads=sizes.heads,
            text_width=sizes.text,
        ),
    }
    parts |= weights.cat_modules(architecture(parts["unet"], sizes), dtype=torch.float32)
    for module in parts.values():
        fresh(module, generator)
    parts["unet"].out[2].weight.data.zero_()
    clip_embeddings = parts["clip_vision"].vision_model.embeddings
    clip_embeddings.patch_embedding.weight.data.copy_(_waves(sizes.vision, _PATCH))
    for embeddings in (clip_embeddings, parts["sem_inpainter"].embeddings):
        table = embeddings.position_embedding.weight
        table.data[-256:] = _places(sizes.vision)  # CLIP's begins with the class token
    return parts


def architecture(unet: nn.Module, sizes: Sizes = DRAWN_SCENES) -> Architecture:
    """What the file's header says of the networks."""
    return Architecture(
        sem_inpainter=SemInpainterConfig(
            hidden_size=sizes.vision,
            intermediate_size=2 * sizes.vision,
            num_hidden_layers=sizes.vision_layers,
            num_attention_heads=sizes.heads,
            grid_size=16,
            text_size=sizes.text,
            text_intermediate_size=2 * sizes.text,
            spatial_intermediate_size=2 * sizes.vision,
            global_intermediate_size=2 * sizes.vision,
        ),
        ref_adapter=RefAdapterConfig(
            visual_size=sizes.vision,
            num_heads=sizes.heads,
            blocks=unet_blocks(unet.state_dict()),
        ),
        unet_num_heads=sizes.heads,
        clip_text_num_heads=sizes.text_heads,
        clip_vision_num_heads=sizes.heads,
    )


def _waves(width: int, patch: int) -> torch.Tensor:
    """(width, 3, patch, patch): each channel's lowest cosine components.

    So tokens show edges from the start.
    """
    pixels = (torch.arange(patch) + 0.5) * math.pi / patch
    orders = sorted(itertools.product(range(8), range(8)), key=_fineness)
    weight = torch.zeros(width, 3, patch, patch)
    for number in range(width // 3 * 3):
        i, j = orders[number // 3]
        wave = (i * pixels).cos().view(-1, 1) * (j * pixels).cos()
        # Pictures hold less of the finer ones.
        weight[number, number % 3] = wave / wave.norm() / patch * (1 + i + j)
    return weight


def _fineness(order: tuple[int, int]):
    return sum(order), order


def _places(width: int) -> torch.Tensor:
    """(256, width): sines and cosines of row and column.

    So attention finds neighbours from the start.
    """
    frequencies = math.pi * 2 ** -torch.linspace(0, 4, width // 4)  # wavelengths of 2 to 32 patches
    waves = torch.arange(16).view(-1, 1) * frequencies
    line = 0.3 * torch.cat((waves.sin(), waves.cos()), dim=1)  # (16, width / 2)
    rows = repeat(line, "row d -> (row column) d", column=16)
    columns = repeat(line, "column d -> (row column) d", row=16)
    return torch.cat((rows, columns), dim=1)


@torch.no_grad()
def fresh(module: nn.Module, generator: torch.Generator) -> None:
    """Random weights with a deviation of 1 / sqrt(fan-in), in place.

    Branches' ends have a tenth of that, and RefAdapter's output is zero.
    """
    for name, parameter in module.named_parameters():
        path = f".{name}"
        is_table = parameter.ndim == 2 and path.endswith("embedding.weight")
        if is_table or path.endswith("class_embedding"):
            parameter.normal_(std=0.1, generator=generator)
        elif parameter.ndim < 2:
            parameter.fill_(1.0 if _is_norm_weight(path) else 0.0)
        elif ".attn3.to_out." in path:
            parameter.zero_()
        else:
            gain = 0.1 if any(end in path for end in _BRANCH_ENDS) else 1.0
            parameter.normal_(std=gain / math.sqrt(parameter[0].numel()), generator=generator)


def _is_norm_weight(path: str) -> bool:
    return path.endswith("weight") and ("norm" in path or path.endswith(_NUMBERED_NORMS))


@torch.no_grad()
def scale_latents(vae: nn.Module, latent: torch.Tensor) -> None:
    """Fold a shift and a scale into the VAE, so that its scaled latents have mean 0 and variance 1.

    Reconstructions stay the same.

    Args:
        latent: (N, 4, h, w), what the VAE encodes now, unscaled.
    """
    mean = latent.mean((0, 2, 3))
    gain = 1 / (LATENT_SCALE * latent.std((0, 2, 3)))  # (4,)
    vae.quant_conv.weight[:4] *= gain.view(-1, 1, 1, 1)
    vae.quant_conv.bias[:4] = (vae.quant_conv.bias[:4] - mean) * gain
    vae.quant_conv.bias[4:] += 2 * gain.log()  # log variance
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight /= gain.view(1, -1, 1, 1)
