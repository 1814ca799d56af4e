"""Networks that an evaluation names: the host's CLIP, FID's Inception, and open_clip's models."""

import dataclasses
from pathlib import Path

import torch

from cat_diffusion.cat_core import preprocess
from cat_diffusion.cat_core.evaluation.extractors import Extractor, Inception, OpenClip
from cat_diffusion.cat_core.evaluation.metrics import EvaluationError, Missing
from cat_diffusion.cat_core.pictures.tensors import channels_first
from cat_diffusion.nodes.host import model_files
from cat_diffusion.nodes.host.build import build_clip_vision
from cat_diffusion.nodes.host.clip import encode_image


class HostClip:
    """The image feature of a CLIP vision file (B, D), by the host, in fp32.

    Pictures go through preprocess.clip_input.
    """

    def __init__(self, path: Path):
        file = model_files.read_path(path)
        file.require("clip_vision")
        parts = {"clip_vision": {}}
        for key, tensor in file.parts["clip_vision"].items():
            parts["clip_vision"][key] = tensor.float()
        self.vision = build_clip_vision(dataclasses.replace(file, parts=parts))

    def __call__(self, pictures) -> torch.Tensor:
        _, features = encode_image(self.vision, self.pixels(pictures))
        return features

    @staticmethod
    def pixels(pictures) -> torch.Tensor:
        """Pillow pictures of any size -> (B, 3, 224, 224) uint8."""
        return torch.cat(
            [preprocess.clip_input(channels_first(picture)).image for picture in pictures]
        )


def build_extractor(text: str, device: torch.device) -> Extractor:
    """KIND:FILE -> a network that makes features of pictures."""
    kind, _, file = text.partition(":")
    if kind == "inception" and file:
        return Inception(Path(file), device)
    if kind == "clip" and file:
        return HostClip(Path(file))
    raise EvaluationError(f"--extractor is {text!r}, expected inception:FILE or clip:FILE.")


def build_open_clip(text: str | None, device: torch.device) -> OpenClip:
    """MODEL:PRETRAINED -> the network of the CLIP score."""
    if text is None:
        raise Missing("it needs --clip-score MODEL:PRETRAINED.")
    if text.startswith("local-dir:"):
        return OpenClip(text, None, device)
    model, _, pretrained = text.partition(":")
    if not model or not pretrained:
        raise EvaluationError(
            f"--clip-score is {text!r}, expected MODEL:FILE, MODEL:TAG or local-dir:FOLDER, such "
            "as ViT-L-14-quickgelu:openai."
        )
    return OpenClip(model, pretrained, device)
