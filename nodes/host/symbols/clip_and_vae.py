"""CLIP, CLIP vision and VAE: new ones in any size, and what is inside those of the host."""

import inspect
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.clip_vision
import comfy.ldm.models.autoencoder
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import folder_paths
import torch

from .weights_and_memory import LayersWithWeights, device_of, load, parameter_count


def stock_text_config() -> dict:
    """The configuration of SD 1.5's text encoder.

    comfy/sd1_clip.py:95 (sd1_clip_config.json). Without it no checkpoint's text encoder loads.
    """
    folder = os.path.dirname(inspect.getfile(comfy.sd1_clip))
    with open(os.path.join(folder, "sd1_clip_config.json"), encoding="utf-8") as file:
        return json.load(file)


def new_text_encoder(config: dict, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """CLIP's text part alone; it has a text projection in any case.

    comfy/clip_model.py:192 (CLIPTextModel). Without it keys of a file cannot be checked.
    """
    return comfy.clip_model.CLIPTextModel(config, dtype, None, LayersWithWeights)


def new_image_encoder(config: dict, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """CLIP's vision part alone; a configuration with `projection_dim` gives it a projection.

    comfy/clip_model.py:310 (CLIPVisionModelProjection). Without it keys of a file cannot be
    checked.
    """
    return comfy.clip_model.CLIPVisionModelProjection(config, dtype, None, LayersWithWeights)


def new_autoencoder(config: dict) -> torch.nn.Module:
    """The network of a VAE; takes `ddconfig` and `embed_dim`, as v1-inference.yaml has them.

    comfy/ldm/models/autoencoder.py:269 (AutoencoderKL). Without it keys of a file cannot be
    checked.
    """
    return comfy.ldm.models.autoencoder.AutoencoderKL(**config)


def new_clip(tensors: dict[str, torch.Tensor], config: dict, dtype: torch.dtype) -> comfy.sd.CLIP:
    """A CLIP with a text encoder of any size; takes keys without a prefix.

    comfy/supported_models_base.py:25 (ClipTarget), comfy/sd.py:231 (CLIP), and
    `clip_l_model_config` by comfy/sd1_clip.py:105 (_model_config). Without them no checkpoint's
    text encoder loads.
    """
    target = comfy.supported_models_base.ClipTarget(
        comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel
    )
    return comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=parameter_count(tensors),
        state_dict={f"clip_l.transformer.{key}": tensor for key, tensor in tensors.items()},
        model_options={"dtype": dtype, "clip_l_model_config": config},
    )


def new_clip_vision(config: dict, tensors: dict[str, torch.Tensor], dtype: torch.dtype):
    """A CLIP_VISION in any size, from Hugging Face's configuration.

    comfy/clip_vision.py:31 (json_config) and comfy/clip_vision.py:57 (load_sd). Without them no
    checkpoint's image encoder loads.
    """
    # A file, as hosts before 0.30 take no dict.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(config), encoding="utf-8")
        clip_vision = comfy.clip_vision.ClipVisionModel(str(path))
    clip_vision.model.to(dtype)
    clip_vision.load_sd(tensors)
    return clip_vision


def new_vae(tensors: dict[str, torch.Tensor], config: dict) -> comfy.sd.VAE:
    """A VAE in any size; takes what new_autoencoder takes.

    comfy/sd.py:1001 (AutoencoderKL). The host knows the cell of its own configurations alone and
    keeps SD 1.5's for others: comfy/sd.py:494 (downscale_ratio), comfy/sd.py:495 (upscale_ratio),
    comfy/sd.py:496 (latent_channels). Without them no checkpoint's VAE loads.
    """
    vae = comfy.sd.VAE(sd=tensors, config={"params": config})
    ddconfig = config["ddconfig"]
    ratio = 2 ** (len(ddconfig["ch_mult"]) - 1)
    vae.latent_channels = ddconfig["z_channels"]
    vae.downscale_ratio = ratio
    vae.upscale_ratio = ratio
    return vae


def latent_channels(vae) -> int:
    """4 of SD 1.5's VAE.

    comfy/sd.py:496 (latent_channels). Without it a VAE of another family fails inside the host.
    """
    return vae.latent_channels


def vae_cell(vae) -> int:
    """Pixels along one side of a latent cell; the typing error is the host's.

    comfy/sd.py:1370 (spacial_compression_encode). Without it pictures cannot be cropped to whole
    cells.
    """
    return vae.spacial_compression_encode()


class SampledPosterior(torch.nn.Module):
    """What a VAE's encoder gives -> a sample of the posterior, in place of its mode.

    Every picture of a batch has noise of its own, drawn on the CPU, so that it depends neither on
    the device nor on how many pictures the host encodes at once.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Mean and log variance (B, 2C, h, w) -> (B, C, h, w)."""
        mean, log_variance = z.chunk(2, dim=1)
        noise = [torch.randn(mean.shape[1:], generator=self.generator) for _ in mean]
        deviation = torch.exp(0.5 * log_variance.clamp(-30, 20))
        return mean + deviation * torch.stack(noise).to(mean), None


@contextmanager
def sampled_posterior(vae, seed: int) -> Iterator[None]:
    """Inside, the VAE's `encode` samples the posterior; raises ValueError where it has none.

    comfy/ldm/models/autoencoder.py:121 (regularization) and comfy/sd.py:522 (first_stage_model).
    Without them CAT Inpaint Conditioning cannot sample.
    """
    network = vae.first_stage_model
    regularizer = getattr(network, "regularization", None)
    if not isinstance(regularizer, comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer):
        raise ValueError(
            f"posterior is sample, and this VAE ({type(network).__name__}) has none to sample; "
            "expected SD 1.5's VAE. Connect that one, or set posterior to mode."
        )
    network.regularization = SampledPosterior(seed)
    try:
        yield
    finally:
        network.regularization = regularizer


def vision_config(clip_vision) -> dict:
    """The configuration of a CLIP_VISION, as in Hugging Face's config.json; empty if it has none.

    comfy/clip_vision.py:42 (config). Without it an encoder that does not fit is noticed late.
    """
    return getattr(clip_vision, "config", {})


def last_hidden_state(clip_vision, image: torch.Tensor) -> torch.Tensor:
    """IMAGE (B, H, W, 3) of the encoder's size -> what leaves the last layer, (B, N + 1, D).

    comfy/clip_vision.py:63 (crop), which would cut the picture to its centre, and
    comfy/clip_vision.py:72 (last_hidden_state). Without them there is no visual prompt.
    """
    return clip_vision.encode_image(image, crop=False)["last_hidden_state"]


class VisionOutput(comfy.clip_vision.Output):
    """A CLIP_VISION_OUTPUT of features that no encoder made; readers ask it for attributes.

    comfy/clip_vision.py:14 (class Output), and comfy/clip_vision.py:72 (last_hidden_state) with the
    lines after it for the names. Without it no node of the host reads a visual prompt's features.

    Args:
        last_hidden_state: (B, N + 1, D), the whole picture's token first.
        image_embeds: (B, P).
    """

    def __init__(self, last_hidden_state: torch.Tensor, image_embeds: torch.Tensor):
        self.last_hidden_state = last_hidden_state
        self.image_embeds = image_embeds
        self.image_sizes = [torch.Size((3, 224, 224))] * len(last_hidden_state)
        self.mm_projected = None

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"A visual prompt has no {name}: SemInpainter predicts CLIP's last layer alone. A node "
            "that asks for it, such as those for video, needs CLIP Vision Encode instead."
        )


def post_layernorm(clip_vision, features: torch.Tensor) -> torch.Tensor:
    """The norm after CLIP vision's last layer, where the encoder computes.

    comfy/clip_model.py:287 (post_layernorm). The host gives the image feature projected alone;
    without this norm SemInpainter has no image feature.
    """
    norm = clip_vision.model.vision_model.post_layernorm
    return norm(features.to(device_of(clip_vision)))


def load_clip_vision(clip_vision) -> None:
    """Load a CLIP_VISION as its own encode_image does.

    comfy/clip_vision.py:55 (patcher). Without it post_layernorm may lie elsewhere than its input.
    """
    load([clip_vision.patcher])


def visual_projection(clip_vision):
    """From CLIP vision's features into CLIP's common space; may be a function without weights.

    comfy/clip_model.py:315 (visual_projection). Without it the preview shows no similarity to the
    text.
    """
    return getattr(clip_vision.model, "visual_projection", None)


def text_projection(clip):
    """From the text encoder's feature into CLIP's common space.

    comfy/sd1_clip.py:729 (clip_model) and comfy/clip_model.py:198 (text_projection). See
    visual_projection.
    """
    transformer = clip.cond_stage_model.clip_l.transformer
    return getattr(transformer, "text_projection", None)


def text_encoders(clip) -> set[str]:
    """Names of the text encoders in a CLIP; SD 1.5's has one, l.

    comfy/sd.py:317 (tokenize) and comfy/sd1_clip.py:700 (clip_name). Without them a CLIP of another
    family fails inside the host.
    """
    return set(clip.tokenize(""))


def token_ids(clip, text: str) -> list[int]:
    """The 77 tokens of a text as it is, by Hugging Face's tokenizer inside the host's.

    comfy/sd1_clip.py:490 (tokenizer_class) and comfy/sd1_clip.py:696 (tokenizer). Without them
    weights, embeddings and escapes in a label would be read as such.
    """
    tokenizer = clip.tokenizer.clip_l.tokenizer
    return tokenizer(text, padding="max_length", truncation=True, max_length=77)["input_ids"]


def tokens_left_out(clip, text: str) -> int:
    """How many tokens of a text do not fit into the 77 of `token_ids`, by the same tokenizer.

    comfy/sd1_clip.py:696 (tokenizer). Without it what is left out of a label is not said.
    """
    return max(len(clip.tokenizer.clip_l.tokenizer(text)["input_ids"]) - 77, 0)


def context(clip, tokens: dict) -> torch.Tensor:
    """What cross-attention reads of a text, (1, 77, T).

    comfy/sd.py:391 (encode_from_tokens). Without it there is no training.
    """
    return clip.encode_from_tokens(tokens)


def pooled_feature(clip, tokens: dict) -> Any:
    """CLIP's pooled text feature (1, T) as the encoder gives it, projected or not.

    comfy/sd.py:391 (return_pooled). Without it the preview shows no similarity to the text.
    """
    _, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    return pooled


def unprojected_feature(clip, tokens: dict) -> torch.Tensor | None:
    """CLIP's pooled text feature (1, T), before any projection.

    comfy/sd.py:397 (unprojected). SD 1.5's own encoder never projects, by comfy/sd1_clip.py:714
    (return_projected_pooled); other encoders of the same name do. Without it SemInpainter would
    read a projected feature of those.
    """
    _, pooled = clip.encode_from_tokens(tokens, return_pooled="unprojected")
    return pooled
