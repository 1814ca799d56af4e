"""Networks that turn pictures into features, and a place to keep the features of any number of pictures.

An extractor is called with pictures (RGB, of any size) and returns their features (B, D); it does its own resizing.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .metrics import EvaluationError, Missing

Extractor = Callable[[Sequence[Image.Image]], torch.Tensor]


class FeatureFile:
    """Features (N, D) of pictures in order, float32 in a temporary file, so that memory does not grow with N."""

    def __init__(self):
        self.file = tempfile.TemporaryFile()
        self.count = self.width = 0

    def append(self, features: torch.Tensor) -> None:
        """Add (B, D)."""
        self.count, self.width = self.count + len(features), features.shape[1]
        self.file.write(features.float().cpu().numpy().tobytes())

    def batches(self, rows: np.ndarray | None = None, size: int = 256) -> Iterator[torch.Tensor]:
        """All features in order, or those of `rows` (sorted), `size` at once."""
        stored = np.memmap(self.file, np.float32, "r", shape=(self.count, self.width))
        rows = np.arange(self.count) if rows is None else np.sort(rows)
        for start in range(0, len(rows), size):
            yield torch.from_numpy(stored[rows[start : start + size]])


class Inception:
    """FID's own network, Inception v3 with TensorFlow's weights of 2015 as torch-fidelity converted them: (B, 2048).

    Pictures are resized to 299x299 by Pillow's bicubic filter, which clean-fid found to matter least.

    Args:
        path: torch-fidelity's weights file (pt_inception-2015-12-05), which this never downloads.
    Raises:
        Missing: torchmetrics or torch-fidelity is not installed.
        EvaluationError: the file is missing or not that network's.
    """

    SIZE = 299  # pixels

    def __init__(self, path: Path, device: torch.device):
        try:
            import torch_fidelity
            from torchmetrics.image.fid import NoTrainInceptionV3
        except ImportError as error:
            raise Missing(
                f"Inception features need torchmetrics and torch-fidelity ({error}). "
                "Install requirements-evaluate.txt with ComfyUI's Python."
            ) from error
        if not path.is_file():
            raise EvaluationError(
                f"{path} is not a file, expected torch-fidelity's Inception weights. Download "
                "weights-inception-2015-12-05-6726825d.pth from torch-fidelity's releases."
            )
        try:
            torch.load(
                path, weights_only=True, mmap=True
            )  # torch-fidelity would run what a pickle says
            network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
        except (
            Exception
        ) as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for what is broken
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise EvaluationError(
                f"{path} is not torch-fidelity's Inception file ({reason}). "
                "Download weights-inception-2015-12-05-6726825d.pth again."
            ) from error
        self.network, self.device = network.to(device), device

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        resized = [
            np.asarray(picture.resize((self.SIZE, self.SIZE), Image.Resampling.BICUBIC))
            for picture in pictures
        ]
        return self.network(
            torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(self.device)
        ).cpu()


class OpenClip:
    """Image and text features (B, D) of an open_clip model, with that model's own preprocessing and tokenizer.

    Args:
        name: as open_clip calls it (ViT-L-14), or local-dir:FOLDER with open_clip_config.json and weights.
        pretrained: a weights file, or the tag of weights that open_clip has downloaded before. None with local-dir.
    Raises:
        Missing: open_clip is not installed, or the tag's weights are not on this machine. Nothing is downloaded.
        EvaluationError: open_clip cannot make the model of these.
    """

    def __init__(self, name: str, pretrained: str | None, device: torch.device):
        try:
            import open_clip
        except ImportError as error:
            raise Missing(
                f"open_clip is not installed ({error}). Install requirements-evaluate.txt with ComfyUI's "
                "Python."
            ) from error
        file, settings = pretrained, {}
        if pretrained is not None and not Path(pretrained).is_file():
            file, settings = _downloaded(open_clip, name, pretrained)
        try:
            model, _, self.preprocess = open_clip.create_model_and_transforms(
                name, file, device=device, require_pretrained=True, **settings
            )
        except (
            Exception
        ) as error:  # open_clip raises RuntimeError, FileNotFoundError, KeyError, ...
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise EvaluationError(
                f"open_clip cannot make {name} of {pretrained or 'that folder'}: {reason}. Give MODEL:FILE "
                "with a model of open_clip and weights that belong to it."
            ) from error
        self.model, self.tokenize, self.device = (
            model.eval().requires_grad_(False),
            open_clip.get_tokenizer(name),
            device,
        )

    @torch.inference_mode()
    def image(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """RGB pictures of any size -> (B, D)."""
        return self.model.encode_image(
            torch.stack([self.preprocess(picture) for picture in pictures]).to(self.device)
        ).cpu()

    @torch.inference_mode()
    def text(self, texts: Sequence[str]) -> torch.Tensor:
        """-> (B, D)."""
        return self.model.encode_text(self.tokenize(list(texts)).to(self.device)).cpu()


def _downloaded(open_clip, name: str, tag: str) -> tuple[str, dict]:
    """The file of a tag's weights in Hugging Face's cache, and what else the tag says about preparing pictures."""
    from huggingface_hub import try_to_load_from_cache

    found = open_clip.get_pretrained_cfg(name.replace("/", "-"), tag)
    if not found:
        known = (
            ", ".join(open_clip.list_pretrained_tags_by_model(name))
            or f"none, since open_clip has no model {name}"
        )
        raise EvaluationError(
            f"{tag} is neither a file nor a tag of open_clip's {name}. Its tags: {known}."
        )
    repository, _, file = found.get("hf_hub", "").rpartition("/")
    for file in [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]:
        path = try_to_load_from_cache(repository, file) if repository else None
        if isinstance(path, str):
            return path, {
                "image_mean": found.get("mean"),
                "image_std": found.get("std"),
                "image_interpolation": found.get("interpolation"),
                "image_resize_mode": found.get("resize_mode"),
                "force_quick_gelu": found.get("quick_gelu", False),
            }
    raise Missing(
        f"The weights {tag} of {name} are not in Hugging Face's cache on this machine, and nothing is downloaded here. "
        f"Download {repository or found.get('url')} and give {name}:FILE."
    )
