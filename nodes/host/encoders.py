"""The frozen networks of training, run by the host: CLIP, its text encoder and the VAE."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...cat_core.preprocess import vae_input_of_levels
from . import symbols
from .clip import encode_image, encode_text, plain_tokens

# Of text features that are remembered: labels repeat, captions do not. A context of 77 tokens has
# 237 kB, so a thousand labels stay.
MOST_BYTES = 256 * 2**20


class HostEncoders:
    """`cat_core.training.encoding.Encoders` on the host's CLIP_VISION, CLIP, VAE and MODEL."""

    def __init__(self, clip_vision, clip, vae: Any = None, model: Any = None):
        self.clip_vision = clip_vision
        self.clip = clip
        self.vae = vae
        self.model = model
        self.texts: OrderedDict[tuple[str, str], torch.Tensor] = OrderedDict()  # latest used last
        self.bytes_of_texts = 0

    def image(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, 224, 224) uint8 -> patch features (B, N, D) and image feature (B, D)."""
        on_device = pixels.to(symbols.compute_device(), non_blocking=True)
        patches, image = encode_image(self.clip_vision, on_device)
        return patches.cpu(), image.cpu()

    def text(self, texts: Sequence[str]) -> torch.Tensor:
        """-> pooled text features (B, T)."""
        return self._each("text", texts, self._pooled)

    def context(self, texts: Sequence[str]) -> torch.Tensor:
        """-> what cross-attention reads (B, 77, T)."""
        return self._each("context", texts, self._tokens)

    def latent(self, image: torch.Tensor, hole: torch.Tensor | None = None) -> torch.Tensor:
        """Levels (B, 3, H, W) and a hole (B, 1, H, W), both uint8 -> latents (B, 4, h, w).

        They are as the U-Net sees them.
        """
        device = symbols.compute_device()
        if device.type == "mps":
            device = torch.device("cpu")  # Apple's GPUs have no float64
        levels = image.to(device, non_blocking=True)
        if hole is not None:
            hole = hole.to(device, non_blocking=True)
        faded = vae_input_of_levels(levels, hole).float()
        latent = self.vae.encode(((faded + 1) / 2).movedim(1, -1))
        return symbols.scale_latent(self.model, latent).cpu()

    def _pooled(self, text: str) -> torch.Tensor:
        return encode_text(self.clip, text)

    def _tokens(self, text: str) -> torch.Tensor:
        return symbols.context(self.clip, plain_tokens(self.clip, text))

    def _each(self, kind: str, texts: Sequence[str], encode: Callable) -> torch.Tensor:
        """The features of texts, (1, ...) each, as a batch; each text is encoded once."""
        features = []
        for text in texts:
            if (kind, text) not in self.texts:
                self._remember((kind, text), encode(text).float().cpu())
            self.texts.move_to_end((kind, text))
            features.append(self.texts[kind, text])
        return torch.cat(features)

    def _remember(self, key: tuple[str, str], feature: torch.Tensor) -> None:
        """Keep a text's feature; those that were not used for the longest time make room for it."""
        self.texts[key] = feature
        self.bytes_of_texts += feature.nbytes
        while self.bytes_of_texts > MOST_BYTES and len(self.texts) > 1:
            _, forgotten = self.texts.popitem(last=False)
            self.bytes_of_texts -= forgotten.nbytes
