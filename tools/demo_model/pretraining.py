"""What the demo model needs before CAT-Diffusion's own stages can begin: a small CLIP and a small VAE.

Objectives as in cat_core/training/objectives.py, run by the same loop, on scenes drawn as they are needed.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cat_diffusion.cat_core import preprocess
from cat_diffusion.cat_core.training.objectives import Batch, Terms
from demo_model import scenes
from demo_model.networks import SIZE

_SHARPNESS = 20.0  # inverse temperature of CLIP's softmax
_KL = 1e-6  # weight of the latents' KL divergence, Stable Diffusion's
_CROP = SIZE // 2
LABELS = tuple(f"{colour} {shape}" for shape, colour in scenes.KNOWN)


class Contrastive(nn.Module):
    """CLIP on scenes: the picture finds its caption among the batch's, each object finds its label among all labels.

    The second holds for an object's mean feature and for each of its patches, so that patch features tell
    what they belong to.
    Batch: pixels (B, 3, 224, 224) uint8; caption (B, 77) int64, tokens; object_mask (B, K, 256) float, 1 = the object
    shows in the patch; label (B, K) int64, an index into LABELS, -1 where a picture has fewer objects.

    Args:
        labels: (L, 77) int64, the tokens of LABELS.
    """

    extra = {"captions": 0.0, "objects": 0.0, "patches": 0.0}

    def __init__(self, clip_text: nn.Module, clip_vision: nn.Module, labels: torch.Tensor):
        super().__init__()
        self.clip_text, self.clip_vision = clip_text, clip_vision
        self.register_buffer("labels", labels, persistent=False)
        for module in self.modules():
            if isinstance(
                module, nn.LayerNorm
            ):  # the host adds to a layer's input in place; the backward pass needs it
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(),))

    def weights(self, batch: Batch) -> Terms:
        return dict.fromkeys(self.extra, torch.ones(len(batch["pixels"])))

    def forward(self, batch: Batch) -> tuple[Terms, Terms]:
        """Loss terms, and the shares of objects whose colour and shape are recognised."""
        hidden, _, picture, _ = self.clip_vision(preprocess.clip_normalise(batch["pixels"]))
        texts = F.normalize(self._text(torch.cat((self.labels, batch["caption"]))), dim=1)
        labels, captions = texts[: len(self.labels)], texts[len(self.labels) :]
        logits = _SHARPNESS * F.normalize(picture, dim=1) @ captions.T  # (B, B)
        own = torch.arange(len(logits), device=logits.device)
        captions_loss = (
            F.cross_entropy(logits, own, reduction="none")
            + F.cross_entropy(logits.T, own, reduction="none")
        ) / 2

        there = batch["label"] >= 0  # (B, K)
        label = batch["label"][there]  # (O,)
        m = batch["object_mask"][there]  # (O, 256)
        patches = hidden[:, 1:]  # (B, 256, D)
        pooled = (batch["object_mask"] @ patches)[there] / m.sum(1, keepdim=True)  # (O, D)
        objects = _SHARPNESS * self._project(pooled) @ labels.T  # (O, L)
        surprise = -(_SHARPNESS * self._project(patches) @ labels.T).log_softmax(2)  # (B, 256, L)
        each = surprise[there.nonzero()[:, 0], :, label]  # (O, 256)
        pairs = torch.tensor(
            [scenes.PAIRS.index(pair) for pair in scenes.KNOWN], device=label.device
        )
        found, true, colours = pairs[objects.argmax(1)], pairs[label], len(scenes.COLOUR_NAMES)
        figures = {
            "objects": F.cross_entropy(objects, label, reduction="none"),
            "patches": (m * each).sum(1) / m.sum(1),
            "colour": (found % colours == true % colours).float(),
            "shape": (found // colours == true // colours).float(),
        }
        by_picture = {
            name: torch.zeros(there.shape).to(value).masked_scatter(there, value).sum(1)
            / there.sum(1)
            for name, value in figures.items()
        }
        return (
            {
                "captions": captions_loss,
                "objects": by_picture["objects"],
                "patches": by_picture["patches"],
            },
            {"colour": by_picture["colour"], "shape": by_picture["shape"]},
        )

    def _project(self, features):
        vision = self.clip_vision
        return F.normalize(
            vision.visual_projection(vision.vision_model.post_layernorm(features)), dim=-1
        )

    def _text(self, tokens):
        """The text features (B, D). Attention is causal, so tokens beyond the longest text are left out."""
        model, ends = self.clip_text.text_model, tokens.argmax(1)
        length = int(ends.max()) + 1
        x = (
            model.embeddings.token_embedding(tokens[:, :length])
            + model.embeddings.position_embedding.weight[:length]
        )
        future = x.new_full((length, length), float("-inf")).triu(1)
        x = model.final_layer_norm(model.encoder(x, mask=future)[0])
        return x[torch.arange(len(x), device=x.device), ends]


class Reconstruction(nn.Module):
    """The VAE: mean absolute error, in which the object counts three times, and a little KL divergence.

    Batch: picture (B, 3, H, W) in [-1, 1]; object (B, 1, H, W) in [0, 1]; noise (B, 4, h, w).
    """

    extra = {"error": 0.0, "kl": 0.0}

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def weights(self, batch: Batch) -> Terms:
        return dict.fromkeys(self.extra, torch.ones(len(batch["picture"])))

    def forward(self, batch: Batch) -> tuple[Terms, Terms]:
        mean, log_variance = self.vae.quant_conv(self.vae.encoder(batch["picture"])).chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        latent = mean + (log_variance / 2).exp() * batch["noise"]
        error = (self.vae.decoder(self.vae.post_quant_conv(latent)) - batch["picture"]).abs()
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)) / 2
        return (
            {"error": ((1 + 2 * batch["object"]) * error).mean((1, 2, 3)), "kl": _KL * kl},
            {"absolute_error": error.mean((1, 2, 3))},
        )


def clip_source(tokenize, batch_size: int, seed: int):
    """(step, positions) -> batch for Contrastive; tokenize: texts -> (B, 77) int64."""

    def source(step, positions):
        drawn = [
            scenes.scene(_scene_seed(seed, step * batch_size + position), SIZE)
            for position in positions
        ]
        pictures = torch.cat([_image(s.image) for s in drawn])
        large = (
            preprocess.resize(pictures, preprocess.SIZE, preprocess.SIZE) / 255
        )  # as clip_input does without a hole
        labels, masks = torch.full((len(drawn), 4), -1), torch.zeros(len(drawn), 4, 256)
        for row, s in enumerate(drawn):
            for place, label in enumerate(s.labels):
                cover = F.interpolate(
                    _image(255 * (s.objects == place + 1)[..., None]), (16, 16), mode="area"
                )
                masks[row, place] = (
                    cover.flatten() > 0.02
                ).float()  # the outline tells the shape, so patches beside it count
                if masks[row, place].any():
                    labels[row, place] = LABELS.index(label)
        return {
            "pixels": preprocess.resize(large, preprocess.CLIP_SIZE, preprocess.CLIP_SIZE),
            "caption": tokenize([s.caption for s in drawn]),
            "object_mask": masks,
            "label": labels,
        }

    return source


def vae_source(batch_size: int, seed: int, whole_from: int):
    """(step, positions) -> batch for Reconstruction: crops around the object, whole pictures from a step on.

    A quarter of the pictures have a black hole, as the inpainting U-Net's masked pictures do.
    """

    def source(step, positions):
        pictures, objects, noises = [], [], []
        for position in positions:
            number = step * batch_size + position
            s = scenes.scene(_scene_seed(seed, number), SIZE)
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            picture, mask = _image(s.image)[0], _image(s.mask[..., None])[0]
            if torch.rand(1, generator=generator) < 0.25:
                kind = ("exact", "box")[int(torch.randint(2, (1,), generator=generator))]
                picture = picture * (1 - _image(scenes.holes(s, kind)[..., None])[0])
            if step < whole_from:
                x0, y0, x1, y1 = (edge * SIZE for edge in s.box)
                jitter = _CROP * 0.5 * (torch.rand(2, generator=generator) - 0.5)
                x, y = (
                    int(min(max((low + high - _CROP) / 2 + shift, 0), SIZE - _CROP))
                    for low, high, shift in zip((x0, y0), (x1, y1), jitter.tolist())
                )
                picture, mask = (part[:, y : y + _CROP, x : x + _CROP] for part in (picture, mask))
            if torch.rand(1, generator=generator) < 0.5:
                picture, mask = picture.flip(2), mask.flip(2)
            pictures.append(2 * picture - 1)
            objects.append(mask)
            noises.append(
                torch.randn(4, picture.shape[1] // 8, picture.shape[2] // 8, generator=generator)
            )
        return {
            "picture": torch.stack(pictures),
            "object": torch.stack(objects),
            "noise": torch.stack(noises),
        }

    return source


def _scene_seed(seed: int, number: int) -> int:
    """Training scenes that no cache of `write`'s first scenes holds."""
    return 1_000_000 * (1 + seed) + number


def _image(array: np.ndarray) -> torch.Tensor:
    """(H, W, C) uint8 -> (1, C, H, W) in [0, 1]."""
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 255
