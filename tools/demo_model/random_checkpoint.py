"""Seeded random weights in the official checkpoint layout: for trying the pack and for its tests, not for pictures.

Runs in ComfyUI's Python; shapes come from the host's own classes and the pack's.
"""

import argparse

import torch
from comfy.clip_model import CLIPTextModel, CLIPVisionModelProjection
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ops import disable_weight_init

from cat_diffusion.cat_core import weights
from cat_diffusion.cat_core.config import (
    Architecture,
    RefAdapterConfig,
    SemInpainterConfig,
    unet_blocks,
)

# The sizes that differ; "full" is SD 1.5 with CLIP ViT-L/14, "tiny" runs in milliseconds.
SIZES = {
    "full": dict(
        unet=320,
        mult=[1, 2, 4, 4],
        depth=[1, 1, 1, 1, 1, 1, 0, 0],
        res=2,
        heads=8,
        text=768,
        text_layers=12,
        vision=1024,
        layers=24,
        clip_heads=None,
        vae=128,
        vae_mult=[1, 2, 4, 4],
        vae_res=2,
    ),
    "tiny": dict(
        unet=32,
        mult=[1, 2],
        depth=[1, 1],
        res=1,
        heads=4,
        text=24,
        text_layers=2,
        vision=32,
        layers=2,
        clip_heads=4,
        vae=32,
        vae_mult=[1, 1, 2, 2],
        vae_res=1,
    ),
}


def random_checkpoint(size: str = "tiny", seed: int = 0, dtype: torch.dtype = torch.float32):
    """Parts by name, and their architecture; the same seed gives the same weights on any machine."""
    sizes = SIZES[size]
    with torch.device("meta"):
        modules = _modules(sizes)
        architecture = Architecture(
            sem_inpainter=SemInpainterConfig(
                hidden_size=sizes["vision"],
                intermediate_size=4 * sizes["vision"],
                num_hidden_layers=sizes["layers"],
                num_attention_heads=sizes["clip_heads"] or sizes["vision"] // 64,
                grid_size=16,
                text_size=sizes["text"],
                text_intermediate_size=4 * sizes["text"],
                spatial_intermediate_size=4 * sizes["vision"],
                global_intermediate_size=4 * sizes["vision"],
            ),
            ref_adapter=RefAdapterConfig(
                visual_size=sizes["vision"],
                num_heads=sizes["heads"],
                blocks=unet_blocks(modules["unet"].state_dict()),
            ),
            unet_num_heads=sizes["heads"],
            clip_text_num_heads=sizes["clip_heads"],
            clip_vision_num_heads=sizes["clip_heads"],
        )
        modules |= weights.cat_modules(architecture)
    generator = torch.Generator().manual_seed(seed)
    parts = {
        part: {
            key: _random(key, value.shape, generator).to(dtype)
            for key, value in modules[part].state_dict().items()
            if not key.startswith("text_projection")
        }
        for part in weights.PREFIXES
    }
    return parts, architecture


def _modules(sizes: dict) -> dict[str, torch.nn.Module]:
    text = dict(
        hidden_size=sizes["text"],
        intermediate_size=4 * sizes["text"],
        num_hidden_layers=sizes["text_layers"],
        num_attention_heads=sizes["clip_heads"] or 12,
        hidden_act="quick_gelu",
        max_position_embeddings=77,
        eos_token_id=49407,
    )
    vision = dict(
        hidden_size=sizes["vision"],
        intermediate_size=4 * sizes["vision"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["clip_heads"] or 16,
        hidden_act="quick_gelu",
        image_size=224,
        patch_size=14,
        num_channels=3,
        model_type="clip_vision_model",
    )
    ddconfig = dict(
        double_z=True,
        z_channels=4,
        resolution=256,
        in_channels=3,
        out_ch=3,
        ch=sizes["vae"],
        ch_mult=sizes["vae_mult"],
        num_res_blocks=sizes["vae_res"],
        attn_resolutions=[],
        dropout=0.0,
    )
    levels = len(sizes["mult"])
    per_level = [sizes["depth"][i * sizes["res"] : (i + 1) * sizes["res"]] for i in range(levels)]
    return {
        "unet": UNetModel(
            image_size=32,
            in_channels=9,
            model_channels=sizes["unet"],
            out_channels=4,
            num_res_blocks=[sizes["res"]] * levels,
            channel_mult=sizes["mult"],
            num_heads=sizes["heads"],
            num_head_channels=-1,
            use_spatial_transformer=True,
            transformer_depth=list(sizes["depth"]),
            transformer_depth_output=[
                depth for level in per_level for depth in [*level, level[-1]]
            ],
            transformer_depth_middle=1,
            context_dim=sizes["text"],
            legacy=False,
            operations=disable_weight_init,
        ),
        "vae": AutoencoderKL(ddconfig=ddconfig, embed_dim=4),
        "clip_text": CLIPTextModel(text, None, None, torch.nn),
        "clip_vision": CLIPVisionModelProjection(vision, None, None, torch.nn),
    }


def _random(key: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Norms near the identity, embeddings of 0.1, everything else scaled by its fan-in."""
    x = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        # The U-Net's GroupNorms go by number: in_layers.0, out_layers.0 and out.0.
        norm = (
            "norm" in key
            or ".in_layers.0." in key
            or ".out_layers.0." in key
            or key.startswith("out.0.")
        )
        return 0.02 * x + (1.0 if norm and key.endswith("weight") else 0.0)
    return x * (0.1 if "embedding" in key else shape[1:].numel() ** -0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="file to write (.safetensors)")
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
