"""Networks that an evaluation names: the host's CLIP, FID's Inception, and open_clip's models."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cat_diffusion.cat_core import preprocess
from cat_diffusion.cat_core.evaluation.extractors import Extractor, Inception, OpenClip
from cat_diffusion.cat_core.evaluation.feature_cache import FeatureCache
from cat_diffusion.cat_core.evaluation.measure import Networks
from cat_diffusion.cat_core.evaluation.metrics import EvaluationError, Missing
from cat_diffusion.cat_core.evaluation.more_networks import DinoV2, Lpips, PictureScore
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


def build_networks(
    arguments, device: torch.device, or_note: Callable[[str, Callable], Any]
) -> Networks:
    """What the newer metrics need, as far as it was asked for and is there.

    Args:
        or_note: (what is left out, how to build it) -> that, or None and a note.
    """
    sets = {}
    if arguments.cmmd:
        clip = or_note("CMMD is", partial(build_open_clip, arguments.cmmd, device, "--cmmd"))
        if clip:
            sets["cmmd"] = clip.image
    if arguments.dinov2:
        build = partial(DinoV2, arguments.dinov2, device)
        network = or_note("Fréchet distance by DINOv2 is", build)
        if network:
            sets["fd_dinov2"] = network
    lpips = None
    if arguments.lpips:
        lpips = or_note("LPIPS is", partial(Lpips, arguments.lpips, device))
    return Networks(sets, lpips, build_score(arguments.score))


def build_score(text: str | None) -> PictureScore | None:
    """python:FILE:FUNCTION -> that function; None without one."""
    if text is None:
        return None
    kind, _, rest = text.partition(":")
    file, _, function = rest.rpartition(":")
    if kind != "python" or not file or not function:
        raise EvaluationError(f"--score is {text!r}, expected python:FILE:FUNCTION.")
    return PictureScore(Path(file), function)


def with_cache(path: Path, networks: Mapping[str, tuple[Extractor, str]]) -> dict[str, Extractor]:
    """Extractors that keep their features in a file; raises EvaluationError.

    Args:
        networks: each with the option that names it.
    """
    cache = FeatureCache(path)
    cached = {}
    for name, (network, option) in networks.items():
        cached[name] = cache(network, identity_of(f"{name}:{option}"))
    return cached


def identity_of(text: str) -> str:
    """What tells a network from others: the option that names it, and its files' contents."""
    digest = hashlib.sha256(text.encode())
    path = Path(text.rpartition(":")[2])
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        if file.is_file():
            with open(file, "rb") as opened:
                while block := opened.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def build_open_clip(
    text: str | None, device: torch.device, option: str = "--clip-score"
) -> OpenClip:
    """MODEL:PRETRAINED -> an open_clip network, of the CLIP score or of another metric."""
    if text is None:
        raise Missing("it needs --clip-score MODEL:PRETRAINED.")
    if text.startswith("local-dir:"):
        return OpenClip(text, None, device)
    model, _, pretrained = text.partition(":")
    if not model or not pretrained:
        raise EvaluationError(
            f"{option} is {text!r}, expected MODEL:FILE, MODEL:TAG or local-dir:FOLDER, such "
            "as ViT-L-14-quickgelu:openai."
        )
    return OpenClip(model, pretrained, device)
