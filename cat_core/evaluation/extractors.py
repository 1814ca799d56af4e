"""Networks that turn pictures into features, and a place to keep the features of many pictures.

An extractor is called with pictures (RGB, of any size) and returns their features (B, D); it does
its own resizing.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from ..errors import how_to_install
from .metrics import EvaluationError, Missing

Extractor = Callable[[Sequence[Image.Image]], torch.Tensor]


class FeatureFile:
    """Features (N, D) of pictures in order, float32.

    They lie in a temporary file, so that memory does not grow with N.
    """

    def __init__(self):
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the features live
        self.count = 0
        self.width = 0

    def append(self, features: torch.Tensor) -> None:
        """Add (B, D)."""
        self.count += len(features)
        self.width = features.shape[1]
        self.file.write(features.float().cpu().numpy().tobytes())

    def batches(self, rows: np.ndarray | None = None, size: int = 256) -> Iterator[torch.Tensor]:
        """All features in order, or those of `rows` (sorted), `size` at once."""
        stored = np.memmap(self.file, np.float32, "r", shape=(self.count, self.width))
        rows = np.arange(self.count) if rows is None else np.sort(rows)
        for start in range(0, len(rows), size):
            yield torch.from_numpy(stored[rows[start : start + size]])


class Inception:
    """FID's own network: Inception v3 with TensorFlow's weights of 2015, (B, 2048).

    torch-fidelity converted the weights. Pictures are resized to 299x299 by Pillow's bicubic
    filter, which clean-fid found to matter least.

    Args:
        path: torch-fidelity's file (pt_inception-2015-12-05), which this never downloads.
    Raises:
        Missing: torchmetrics or torch-fidelity is not installed, or the file is not there.
        EvaluationError: the file is not that network's.
    """

    SIZE = (299, 299)  # pixels

    def __init__(self, path: Path, device: torch.device):
        try:
            import torch_fidelity  # noqa: F401 - torchmetrics needs it without saying so
            from torchmetrics.image.fid import NoTrainInceptionV3
        except ImportError as error:
            raise Missing(
                f"Inception features need torchmetrics and torch-fidelity ({error}). "
                f"Install them with: {how_to_install('requirements-evaluate.txt')}"
            ) from error
        if not path.is_file():
            raise Missing(
                f"{path} is not a file, expected torch-fidelity's Inception weights. Download "
                "weights-inception-2015-12-05-6726825d.pth from torch-fidelity's releases."
            )
        try:
            # A first look at the file, since torch-fidelity would run what a pickle says.
            torch.load(path, weights_only=True, mmap=True)
            network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
        # torch raises RuntimeError, UnpicklingError, EOFError, ... for what is broken.
        except Exception as error:
            raise EvaluationError(
                f"{path} is not torch-fidelity's Inception file ({_reason(error)}). "
                "Download weights-inception-2015-12-05-6726825d.pth again."
            ) from error
        self.network = network.to(device)
        self.device = device

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        resized = []
        for picture in pictures:
            resized.append(np.asarray(picture.resize(self.SIZE, Image.Resampling.BICUBIC)))
        levels = rearrange(torch.from_numpy(np.stack(resized)), "b h w c -> b c h w")
        return self.network(levels.to(self.device)).cpu()


class OpenClip:
    """Image and text features (B, D) of an open_clip model, with its own preprocessing.

    Args:
        name: as open_clip calls it (ViT-L-14), or local-dir:FOLDER with open_clip_config.json and
            weights.
        pretrained: a weights file, or the tag of weights that open_clip has downloaded before.
            None with local-dir.
    Raises:
        Missing: open_clip is not installed, or the tag's weights are not on this machine. Nothing
            is downloaded.
        EvaluationError: open_clip cannot make the model of these.
    """

    def __init__(self, name: str, pretrained: str | None, device: torch.device):
        try:
            import open_clip
        except ImportError as error:
            raise Missing(
                f"open_clip is not installed ({error}). Install it with: "
                f"{how_to_install('requirements-evaluate.txt')}"
            ) from error
        file = pretrained
        settings = {}
        if pretrained is not None and not Path(pretrained).is_file():
            file, settings = downloaded(open_clip, name, pretrained)
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(
                name, file, device=device, require_pretrained=True, **settings
            )
        # open_clip raises RuntimeError, FileNotFoundError, KeyError, ...
        except Exception as error:
            raise EvaluationError(
                f"open_clip cannot make {name} of {pretrained or 'that folder'}: "
                f"{_reason(error)}. Give MODEL:FILE with a model of open_clip and weights that "
                "belong to it."
            ) from error
        self.model: Any = model.eval().requires_grad_(False)
        self.preprocess: Any = preprocess
        self.tokenize = open_clip.get_tokenizer(name)
        self.device = device

    @torch.inference_mode()
    def image(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """RGB pictures of any size -> (B, D)."""
        pixels = torch.stack([self.preprocess(picture) for picture in pictures])
        return self.model.encode_image(pixels.to(self.device)).cpu()

    @torch.inference_mode()
    def text(self, texts: Sequence[str]) -> torch.Tensor:
        """-> (B, D)."""
        tokens = self.tokenize(list(texts))
        return self.model.encode_text(tokens.to(self.device)).cpu()


def downloaded(open_clip, name: str, tag: str) -> tuple[str, dict]:
    """A tag's weights in Hugging Face's cache, and the settings that go with them.

    Returns:
        the file, and what else the tag says: about preparing pictures, and quick GELU.
    Raises:
        EvaluationError: open_clip knows no such tag.
        Missing: the weights are not on this machine.
    """
    from huggingface_hub import try_to_load_from_cache

    described = open_clip.get_pretrained_cfg(name.replace("/", "-"), tag)
    if not described:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        if not tags:
            tags = f"none, since open_clip has no model {name}"
        raise EvaluationError(
            f"{tag} is neither a file nor a tag of open_clip's {name}. Its tags: {tags}."
        )
    # open_clip.pretrained writes "owner/name/" where the file has one of its usual names.
    repository, _, file = described.get("hf_hub", "").rpartition("/")
    names = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    for file in names:
        path = try_to_load_from_cache(repository, file) if repository else None
        if isinstance(path, str):
            return path, {
                "image_mean": described.get("mean"),
                "image_std": described.get("std"),
                "image_interpolation": described.get("interpolation"),
                "image_resize_mode": described.get("resize_mode"),
                "force_quick_gelu": described.get("quick_gelu", False),
            }
    raise Missing(
        f"The weights {tag} of {name} are not in Hugging Face's cache on this machine, and "
        f"nothing is downloaded here. Download {repository or described.get('url')} and give "
        f"{name}:FILE."
    )


def _reason(error: Exception) -> str:
    """The first line of what a library says, or the error's class where it says nothing."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
