"""The demo model's CLIP in training: pictures find captions, things their names."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from cat_diffusion.cat_core.training.objectives import Batch, Terms
from demo_model.world_texts import Texts, encode_texts, longest

_SHARPNESS = 20.0  # inverse temperature of the softmax
_COVERED = 0.1  # of a patch


class WorldContrastive(nn.Module):
    """CLIP on pictures of the demo model's world, in two languages.

    A picture finds its caption among the batch's. A thing finds its name among all names, and name
    and style among all pairs; the second holds for each of its patches too, so that these tell what
    they belong to, and in which style.

    Batch: pixels (B, 3, 224, 224), normalised; caption (B, 77) int64; cover (B, K, 256), how much
    of a patch the thing covers; thing (B, K) int64, -1 where there are fewer; style (B,) int64.

    Shapes below: O all things of a batch, L all names, 3 L all pairs.
    """

    extra: ClassVar[Mapping[str, float]] = {
        "captions": 0.0,
        "names": 0.0,
        "pairs": 0.0,
        "patches": 0.0,
    }

    def __init__(self, clip_text: nn.Module, clip_vision: nn.Module, texts: Texts):
        super().__init__()
        self.clip_text = clip_text
        self.clip_vision = clip_vision
        for language, forms in enumerate(texts.asked):
            for number, tokens in enumerate(forms[1:]):
                self.register_buffer(f"names_{language}_{number}", tokens, persistent=False)
            styled = texts.styled[language]
            self.register_buffer(f"pairs_{language}", styled, persistent=False)
        self.languages = len(texts.asked)
        self.forms = len(texts.asked[0]) - 1
        self.calls = 0
        # The host adds to a layer's input in place; the backward pass needs it as it was.
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_pre_hook(_copy)

    def weights(self, batch: Batch) -> Terms:
        """Every picture counts the same in every term: (B,)."""
        ones = torch.ones(len(batch["pixels"]), device=batch["pixels"].device)
        return dict.fromkeys(self.extra, ones)

    def forward(self, batch: Batch) -> tuple[Terms, Terms]:
        """Loss terms, and the shares of things whose name and style are seen, all (B,)."""
        hidden, _, picture, _ = self.clip_vision(batch["pixels"])
        # Languages and forms take turns: it depends on the batch, whose tensors differ.
        turn = int(batch["caption"].sum()) % (self.languages * self.forms)
        language = turn % self.languages
        names = self._text(getattr(self, f"names_{language}_{turn // self.languages}"))
        pairs = self._text(getattr(self, f"pairs_{language}"))
        captions = self._text(batch["caption"])
        terms, watched = self._things(batch, hidden[:, 1:], names, pairs)
        return {"captions": _caption_loss(picture, captions), **terms}, watched

    def _things(self, batch: Batch, patches, names, pairs) -> tuple[Terms, Terms]:
        shows = batch["thing"] >= 0  # (B, K)
        count = shows.sum(1).clamp(min=1)
        thing = batch["thing"][shows]  # (O,)
        picture_index = shows.nonzero()[:, 0]  # (O,)
        style = batch["style"][picture_index]
        pair = style * len(names) + thing
        cover = batch["cover"][shows]  # (O, 256)
        cover = cover * (cover > _COVERED)
        share = cover / cover.sum(1, keepdim=True).clamp(min=1e-6)
        pooled = (share.unsqueeze(1) @ patches[picture_index])[:, 0]  # (O, D)
        seen = self._project(pooled)
        name_logits = _SHARPNESS * seen @ names.T  # (O, L)
        pair_logits = _SHARPNESS * seen @ pairs.T  # (O, 3 L)
        patch_logits = _SHARPNESS * self._project(patches) @ pairs.T  # (B, 256, 3 L)
        normaliser = patch_logits.logsumexp(2)  # (B, 256)
        own = torch.einsum("opd,od->op", self._project(patches)[picture_index], pairs[pair])
        surprise = normaliser[picture_index] - _SHARPNESS * own  # (O, 256)
        guess = pair_logits.argmax(1)
        by_thing = {
            "names": F.cross_entropy(name_logits.float(), thing, reduction="none"),
            "pairs": F.cross_entropy(pair_logits.float(), pair, reduction="none"),
            "patches": (share * surprise).sum(1),
            "thing": (guess % len(names) == thing).float(),
            "style": (guess // len(names) == style).float(),
        }
        by_picture = {}
        for name, values in by_thing.items():
            summed = torch.zeros(len(shows), device=values.device, dtype=values.dtype)
            by_picture[name] = summed.index_add(0, picture_index, values) / count
        watched = {name: by_picture.pop(name) for name in ("thing", "style")}
        return by_picture, watched

    def _project(self, features):
        vision = self.clip_vision
        projected = vision.visual_projection(vision.vision_model.post_layernorm(features))
        return F.normalize(projected.float(), dim=-1)

    def _text(self, tokens):
        _, pooled = encode_texts(self.clip_text, tokens, longest(tokens))
        return F.normalize(pooled.float(), dim=1)


def _copy(_, inputs):
    return (inputs[0].clone(),)


def _caption_loss(pictures: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric loss (B,) of pictures (B, D) and their normalised captions (B, D)."""
    logits = _SHARPNESS * F.normalize(pictures.float(), dim=1) @ captions.T  # (B, B)
    own = torch.arange(len(logits), device=logits.device)
    of_pictures = F.cross_entropy(logits, own, reduction="none")
    of_captions = F.cross_entropy(logits.T, own, reduction="none")
    return (of_pictures + of_captions) / 2
