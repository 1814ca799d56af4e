"""What the demo model needs before CAT-Diffusion's own stages: a small CLIP and a small VAE.

Objectives as in cat_core/training/objectives.py, run by the same loop, on scenes drawn as they are
needed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cat_diffusion.cat_core import preprocess
from cat_diffusion.cat_core.pictures.tensors import channels_first
from cat_diffusion.cat_core.training.objectives import Batch, Terms
from demo_model import scenes
from demo_model.networks import SIZE

LABELS = tuple(f"{colour} {shape}" for shape, colour in scenes.KNOWN)
_PAIR_NUMBERS = tuple(scenes.PAIRS.index(pair) for pair in scenes.KNOWN)  # of each label
_SHARPNESS = 20.0  # inverse temperature of CLIP's softmax
_MOST_OBJECTS = 4  # in a scene
_COVERED = 0.02  # of a patch: the outline tells the shape, so patches beside it count
_KL = 1e-6  # weight of the latents' KL divergence, Stable Diffusion's
_CROP = SIZE // 2
_HOLES = ("exact", "box")

Tokenize = Callable[[Sequence[str]], torch.Tensor]  # texts -> (B, 77) int64
Source = Callable[[int, Iterable[int]], Batch]  # (step, positions in the batch) -> batch


class Contrastive(nn.Module):
    """CLIP on scenes: pictures find their captions, objects find their labels.

    A picture finds its caption among the batch's, an object its label among all labels; the second
    holds for an object's mean feature and for each of its patches, so that patch features tell what
    they belong to.

    Batch: pixels (B, 3, 224, 224) uint8; caption (B, 77) int64, tokens; object_mask (B, K, 256)
    float, 1 = the object shows in the patch; label (B, K) int64, an index into LABELS, -1 where a
    picture has fewer objects.

    Shapes below: O all objects of a batch, L all labels.

    Args:
        labels: (L, 77) int64, the tokens of LABELS.
    """

    extra: ClassVar[Mapping[str, float]] = {"captions": 0.0, "objects": 0.0, "patches": 0.0}

    def __init__(self, clip_text: nn.Module, clip_vision: nn.Module, labels: torch.Tensor):
        super().__init__()
        self.clip_text = clip_text
        self.clip_vision = clip_vision
        self.register_buffer("labels", labels, persistent=False)
        # The host adds to a layer's input in place; the backward pass needs it as it was.
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_pre_hook(_copy_input)

    def weights(self, batch: Batch) -> Terms:
        """Every picture counts the same in every term: (B,)."""
        return dict.fromkeys(self.extra, torch.ones(len(batch["pixels"])))

    def forward(self, batch: Batch) -> tuple[Terms, Terms]:
        """Loss terms, and the shares of objects whose colour and shape are recognised, all (B,)."""
        hidden, _, picture, _ = self.clip_vision(preprocess.clip_normalise(batch["pixels"]))
        texts = F.normalize(self._text(torch.cat((self.labels, batch["caption"]))), dim=1)
        labels = texts[: len(self.labels)]
        captions = texts[len(self.labels) :]
        objects = self._objects(batch, hidden[:, 1:], labels)
        terms = {
            "captions": _caption_loss(picture, captions),
            "objects": objects["objects"],
            "patches": objects["patches"],
        }
        return terms, {"colour": objects["colour"], "shape": objects["shape"]}

    def _objects(self, batch: Batch, patches: torch.Tensor, labels: torch.Tensor) -> Terms:
        """Losses and hits of objects, averaged over those of a picture (B,).

        Args:
            patches: (B, 256, D), CLIP's.
            labels: (L, D), normalised.
        """
        shows = batch["label"] >= 0  # (B, K)
        label = batch["label"][shows]  # (O,)
        mask = batch["object_mask"][shows]  # (O, 256)
        pooled = (batch["object_mask"] @ patches)[shows] / mask.sum(1, keepdim=True)  # (O, D)
        logits = _SHARPNESS * self._project(pooled) @ labels.T  # (O, L)
        patch_logits = _SHARPNESS * self._project(patches) @ labels.T  # (B, 256, L)
        surprise = -patch_logits.log_softmax(2)
        picture_index = shows.nonzero()[:, 0]  # (O,)
        own_surprise = surprise[picture_index, :, label]  # (O, 256)
        # PAIRS goes through the colours of a shape before it comes to the next.
        pairs = torch.tensor(_PAIR_NUMBERS, device=label.device)
        seen = pairs[logits.argmax(1)]
        true = pairs[label]
        colours = len(scenes.COLOUR_NAMES)
        by_object = {
            "objects": F.cross_entropy(logits, label, reduction="none"),
            "patches": (mask * own_surprise).sum(1) / mask.sum(1),
            "colour": (seen % colours == true % colours).float(),
            "shape": (seen // colours == true // colours).float(),
        }
        by_picture = {}
        for name, values in by_object.items():
            spread = torch.zeros(shows.shape).to(values).masked_scatter(shows, values)  # (B, K)
            by_picture[name] = spread.sum(1) / shows.sum(1)
        return by_picture

    def _project(self, features):
        vision = self.clip_vision
        projected = vision.visual_projection(vision.vision_model.post_layernorm(features))
        return F.normalize(projected, dim=-1)

    def _text(self, tokens):
        """The text features (B, D) of tokens (B, 77).

        Attention is causal, so tokens beyond the longest text are left out.
        """
        model = self.clip_text.text_model
        ends = tokens.argmax(1)  # the end token has the highest number
        length = int(ends.max()) + 1
        embedded = model.embeddings.token_embedding(tokens[:, :length])
        x = embedded + model.embeddings.position_embedding.weight[:length]
        future = x.new_full((length, length), float("-inf")).triu(1)
        x = model.final_layer_norm(model.encoder(x, mask=future)[0])
        return x[torch.arange(len(x), device=x.device), ends]


def _copy_input(_, inputs):
    return (inputs[0].clone(),)


def _caption_loss(pictures: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric loss (B,) of pictures (B, D) and their normalised captions (B, D)."""
    logits = _SHARPNESS * F.normalize(pictures, dim=1) @ captions.T  # (B, B)
    own = torch.arange(len(logits), device=logits.device)
    of_pictures = F.cross_entropy(logits, own, reduction="none")
    of_captions = F.cross_entropy(logits.T, own, reduction="none")
    return (of_pictures + of_captions) / 2


class Reconstruction(nn.Module):
    """The VAE: mean absolute error, the object's three times, and a little KL divergence.

    Batch: picture (B, 3, H, W) in [-1, 1]; object (B, 1, H, W) in [0, 1]; noise (B, 4, h, w).
    """

    extra: ClassVar[Mapping[str, float]] = {"error": 0.0, "kl": 0.0}

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def weights(self, batch: Batch) -> Terms:
        """Every picture counts the same in every term: (B,)."""
        return dict.fromkeys(self.extra, torch.ones(len(batch["picture"])))

    def forward(self, batch: Batch) -> tuple[Terms, Terms]:
        """Loss terms, and the plain mean absolute error, all (B,)."""
        mean, log_variance = self.vae.quant_conv(self.vae.encoder(batch["picture"])).chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        latent = mean + (log_variance / 2).exp() * batch["noise"]
        decoded = self.vae.decoder(self.vae.post_quant_conv(latent))
        error = (decoded - batch["picture"]).abs()
        weighted = (1 + 2 * batch["object"]) * error
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)) / 2
        terms = {"error": weighted.mean((1, 2, 3)), "kl": _KL * kl}
        return terms, {"absolute_error": error.mean((1, 2, 3))}


def clip_source(tokenize: Tokenize, batch_size: int, seed: int) -> Source:
    """Batches for Contrastive."""

    def source(step, positions):
        pixels = []
        masks = []
        labels = []
        captions = []
        for position in positions:
            scene = scenes.scene(_scene_seed(seed, step * batch_size + position), SIZE)
            object_masks, object_labels = _objects_of(scene)
            pixels.append(channels_first(scene.image))
            masks.append(object_masks)
            labels.append(object_labels)
            captions.append(scene.caption)
        # As preprocess.clip_input does where there is no hole.
        at_512 = preprocess.resize(torch.cat(pixels), preprocess.SIZE, preprocess.SIZE) / 255
        return {
            "pixels": preprocess.resize(at_512, preprocess.CLIP_SIZE, preprocess.CLIP_SIZE),
            "caption": tokenize(captions),
            "object_mask": torch.stack(masks),
            "label": torch.stack(labels),
        }

    return source


def _objects_of(scene: scenes.Scene) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of CLIP's patches show an object (K, 256), and its label (K,), -1 where none shows."""
    masks = torch.zeros(_MOST_OBJECTS, 256)
    labels = torch.full((_MOST_OBJECTS,), -1)
    for place, label in enumerate(scene.labels):
        visible = channels_first((255 * (scene.objects == place + 1)).astype(np.uint8))
        cover = F.interpolate(visible, (16, 16), mode="area").flatten()
        masks[place] = (cover > _COVERED).float()
        if masks[place].any():
            labels[place] = LABELS.index(label)
    return masks, labels


def vae_source(batch_size: int, seed: int, whole_from: int) -> Source:
    """Batches for Reconstruction: crops around the object, whole pictures from a step on.

    A quarter of the pictures have a black hole, as the inpainting U-Net's masked pictures do.
    """

    def source(step, positions):
        pictures = []
        objects = []
        noises = []
        for position in positions:
            number = step * batch_size + position
            scene = scenes.scene(_scene_seed(seed, number), SIZE)
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            picture = _with_chance_of_hole(scene, generator)
            pair = torch.cat((picture, channels_first(scene.mask)[0]))  # (4, S, S)
            if step < whole_from:
                pair = _crop_around(scene, pair, generator)
            if torch.rand(1, generator=generator) < 0.5:
                pair = pair.flip(2)
            _, height, width = pair.shape
            pictures.append(2 * pair[:3] - 1)
            objects.append(pair[3:])
            noises.append(torch.randn(4, height // 8, width // 8, generator=generator))
        return {
            "picture": torch.stack(pictures),
            "object": torch.stack(objects),
            "noise": torch.stack(noises),
        }

    return source


def _with_chance_of_hole(scene: scenes.Scene, generator: torch.Generator) -> torch.Tensor:
    """The picture (3, S, S) in [0, 1], in a quarter of all cases with a black hole."""
    picture = channels_first(scene.image)[0]
    if torch.rand(1, generator=generator) >= 0.25:
        return picture
    kind = _HOLES[int(torch.randint(2, (1,), generator=generator))]
    return picture * (1 - channels_first(scenes.holes(scene, kind))[0])


def _crop_around(
    scene: scenes.Scene, picture: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """A crop (C, _CROP, _CROP) of a picture (C, S, S) near the middle of the object."""
    jitter = _CROP * 0.5 * (torch.rand(2, generator=generator) - 0.5)
    shift_x, shift_y = jitter.tolist()
    x0, y0, x1, y1 = (edge * SIZE for edge in scene.box)
    x = _crop_start((x0 + x1 - _CROP) / 2 + shift_x)
    y = _crop_start((y0 + y1 - _CROP) / 2 + shift_y)
    return picture[:, y : y + _CROP, x : x + _CROP]


def _crop_start(position: float) -> int:
    return int(min(max(position, 0), SIZE - _CROP))


def _scene_seed(seed: int, number: int) -> int:
    """Training scenes that no cache of `write`'s first scenes holds."""
    return 1_000_000 * (1 + seed) + number
