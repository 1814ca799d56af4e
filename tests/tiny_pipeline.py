"""A pipeline of the diffusers library with tiny random networks."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from paths import COMFYUI
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def tiny_parts(channels, size):
    """What StableDiffusionPipeline and its inpainting (9 channels) are made of.

    Args:
        channels: that the U-Net takes.
        size: side of the pictures in pixels.
    """
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(COMFYUI / "comfy/sd1_tokenizer", model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=16,
    )
    return {
        "unet": UNet2DConditionModel(
            sample_size=size // 8,
            in_channels=channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
        ),
        "vae": AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=size,
        ),
        "text_encoder": CLIPTextModel(text),
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
    }
