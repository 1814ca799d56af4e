"""Networks of the newer metrics: DINOv2, LPIPS, and a score that somebody wrote."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from ..errors import how_to_install
from ..pictures.tensors import from_levels
from ..user_function import first_line, load_function
from .metrics import EvaluationError, Missing

MEAN = (0.485, 0.456, 0.406)  # of ImageNet
STD = (0.229, 0.224, 0.225)


class DinoV2:
    """DINOv2's feature of a picture, the class token after the last norm (B, D), in fp32.

    Pictures are resized to 224x224 by Pillow's bicubic filter, as Stein et al. 2023 evaluate with
    ViT-L/14.

    Args:
        folder: of a model for transformers: config.json with its weights.
    Raises:
        Missing: there is no such folder.
        EvaluationError: it holds something else.
    """

    SIZE = (224, 224)  # pixels

    def __init__(self, folder: Path, device: torch.device):
        if not (folder / "config.json").is_file():
            raise Missing(
                f"{folder} has no config.json, expected a folder with DINOv2 for transformers, "
                "such as facebook/dinov2-large. Download it from Hugging Face."
            )
        from transformers import AutoModel  # it comes with ComfyUI, and takes seconds

        try:
            network = AutoModel.from_pretrained(folder, local_files_only=True)
        # transformers raises OSError, ValueError, KeyError, RuntimeError, ...
        except Exception as error:
            raise EvaluationError(
                f"{folder} cannot be loaded by transformers ({first_line(error)}). Download "
                "DINOv2 again."
            ) from error
        kind = network.config.model_type
        if not kind.startswith("dinov2"):
            raise EvaluationError(
                f"{folder} holds a {kind}, expected DINOv2. Give the folder of such a model."
            )
        self.network: Any = network.float().eval().requires_grad_(False).to(device)
        self.device = device

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        pixels = stacked(pictures, self.SIZE)
        mean = torch.tensor(MEAN).view(3, 1, 1)
        std = torch.tensor(STD).view(3, 1, 1)
        seen = (pixels - mean) / std
        return self.network(seen.to(self.device)).last_hidden_state[:, 0].cpu()


class Lpips:
    """LPIPS with AlexNet, version 0.1: pictures x 2 -> distances (B,), 0 for equal ones.

    torchmetrics carries the weights of its last layers; AlexNet's are torchvision's file.

    Args:
        path: alexnet-owt-7be5be79.pth.
    Raises:
        Missing: torchmetrics is not installed, or there is no such file.
        EvaluationError: the file is not AlexNet's.
    """

    def __init__(self, path: Path, device: torch.device):
        try:
            from torchmetrics.functional.image.lpips import _LPIPS
        except ImportError as error:
            raise Missing(
                f"LPIPS needs torchmetrics and torchvision ({error}). Install them with: "
                f"{how_to_install('requirements-evaluate.txt')}"
            ) from error
        if not path.is_file():
            raise Missing(
                f"{path} is not a file, expected AlexNet's weights. Download "
                "alexnet-owt-7be5be79.pth from torchvision."
            )
        # Without pnet_rand it would download AlexNet.
        self.network = _LPIPS(pretrained=True, net="alex", pnet_rand=True, eval_mode=True)
        try:
            weights = torch.load(path, weights_only=True, map_location="cpu")
            for name, layer in _layers(self.network):
                layer.load_state_dict(
                    {part: weights[f"features.{name}.{part}"] for part in ("weight", "bias")}
                )
        # torch raises RuntimeError, UnpicklingError, KeyError, EOFError, ... for what is broken.
        except Exception as error:
            raise EvaluationError(
                f"{path} is not torchvision's AlexNet ({first_line(error)}). Download "
                "alexnet-owt-7be5be79.pth again."
            ) from error
        self.network.to(device)
        self.device = device

    @torch.inference_mode()
    def __call__(
        self, made: Sequence[Image.Image], originals: Sequence[Image.Image]
    ) -> torch.Tensor:
        seen = [2 * stacked(pictures).to(self.device) - 1 for pictures in (made, originals)]
        return self.network(*seen).flatten().cpu()


def _layers(network) -> list[tuple[str, torch.nn.Module]]:
    """AlexNet's convolutions inside of LPIPS, each with its number in torchvision's file."""
    layers = []
    for slice_number in range(1, 6):
        for name, layer in getattr(network.net, f"slice{slice_number}").named_children():
            if isinstance(layer, torch.nn.Conv2d):
                layers.append((name, layer))
    return layers


class PictureScore:
    """A function (image, mask, text) -> number of a Python file, for scores of people's taste.

    image and mask are Pillow pictures (RGB; L, white = repainted).

    Raises FunctionError where there is no such function.
    """

    def __init__(self, file: Path, name: str):
        self.name = name
        self.function = load_function(file, name, "image, mask, text")

    def __call__(self, picture: Image.Image, hole: Image.Image, text: str, id: str) -> float:
        """The score of one picture; raises EvaluationError where the function fails."""
        try:
            score = float(self.function(picture, hole, text))
        except Exception as error:  # whatever the function does
            raise EvaluationError(
                f"{self.name} fails on {id} ({first_line(error)}); expected a number for every "
                "picture. Mend the function."
            ) from error
        if not math.isfinite(score):
            raise EvaluationError(
                f"{self.name} gives {score} for {id}; expected a finite number for every picture. "
                "Mend the function."
            )
        return score


def stacked(pictures: Sequence[Image.Image], size: tuple[int, int] | None = None) -> torch.Tensor:
    """RGB pictures -> (B, 3, H, W) in [0, 1], all resized by Pillow's bicubic filter to `size`."""
    levels = []
    for picture in pictures:
        shown = picture.resize(size, Image.Resampling.BICUBIC) if size else picture
        levels.append(np.asarray(shown))
    return from_levels(rearrange(torch.from_numpy(np.stack(levels)), "b h w c -> b c h w"))
