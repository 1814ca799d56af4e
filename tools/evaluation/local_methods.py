"""Methods that run in this process: a Python function, or a pipeline of the diffusers library."""

import hashlib
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from cat_diffusion.cat_core.data.masks import SampleError
from cat_diffusion.cat_core.errors import how_to_install
from cat_diffusion.cat_core.pictures import opening
from cat_diffusion.cat_core.user_function import first_line, load_function

from .results_writer import GenerateError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DIFFUSERS = ("prompt", "image", "mask_image", "generator")  # what a pipeline must take


@dataclass(frozen=True)
class Request:
    """What a method makes one picture of."""

    photo: Image.Image  # RGB, size x size
    hole: Image.Image  # L, size x size, white = repaint
    text: str
    seed: int

    @property
    def generator(self) -> torch.Generator:
        """Noise of the sample, on the CPU, so that it is the same on every device."""
        return torch.Generator().manual_seed(self.seed)


class LocalMethod(Protocol):
    """What makes pictures: `facts` say how, `place` where."""

    facts: dict
    place: str

    def __call__(self, requests: Sequence[Request]) -> list[Any]:
        """A picture for each request, or a SampleError."""


def as_picture(made: Any, size: int, name: str) -> Image.Image:
    """What a method returned, as RGB; raises SampleError where it is no picture of that size."""
    if isinstance(made, np.ndarray) and made.dtype == np.uint8 and made.shape[2:] == (3,):
        picture = Image.fromarray(made)
    elif isinstance(made, Image.Image):
        picture = opening.as_rgb(made)
    else:
        dtype = getattr(made, "dtype", None)
        shape = tuple(getattr(made, "shape", ()))
        of = f" of {dtype} {shape}" if dtype is not None else ""
        raise SampleError(
            "no picture",
            f"{name} returned a {type(made).__name__}{of}, expected a Pillow picture or an array "
            "(H, W, 3) of uint8",
        )
    if picture.size != (size, size):
        raise SampleError(
            "wrong size",
            f"{name} made {picture.width}x{picture.height} pixels, expected {size}x{size}",
        )
    return picture


class PythonMethod:
    """A function (image, mask, text, generator) -> image of a Python file.

    image and mask are Pillow pictures (RGB; L, white = repaint), generator is torch's; it returns a
    Pillow picture or a uint8 array (H, W, 3). The file's folder is searched for imports first, as
    when Python runs the file.

    Raises GenerateError where the file cannot be read, FunctionError where it has no such
    function.
    """

    def __init__(self, file: Path, function: str):
        self.name = function
        self.place = "this process"
        self.facts = {"method": f"python:{file.name}:{function}"}
        try:
            content = file.read_bytes()
        except OSError as error:
            raise GenerateError(
                f"{file} cannot be read ({error.strerror}); expected a Python file with a "
                "function (image, mask, text, generator)."
            ) from error
        self.facts["method_sha256"] = hashlib.sha256(content).hexdigest()
        sys.path.insert(0, str(file.parent.absolute()))
        self.function = load_function(file, function, "image, mask, text, generator")

    def __call__(self, requests: Sequence[Request]) -> list[Any]:
        made = []
        for request in requests:
            try:
                made.append(
                    self.function(request.photo, request.hole, request.text, request.generator)
                )
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever the function does
                made.append(SampleError(f"error in {self.name}", first_line(error)))
        return made


class DiffusersMethod:
    """Any pipeline of the diffusers library that takes a photo and a mask.

    Strength is 1: the hole starts from noise alone.

    Args:
        model: a folder with model_index.json, or a repository's name for Hugging Face.
        dtype: one of DTYPES.
        steps: of the sampler; None means the pipeline's own default.
        guidance: the same for the guidance scale.
    Raises:
        GenerateError: diffusers is not installed, there is no such model, or it is not for
            inpainting.
    """

    def __init__(
        self, model: str, device: str, dtype: str, steps: int | None, guidance: float | None
    ):
        folder = model_folder(model)
        self.pipeline = _pipeline(model, folder, DTYPES[dtype]).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.name = type(self.pipeline).__name__
        self.place = device
        self.settings = {"num_inference_steps": steps, "guidance_scale": guidance, "strength": 1.0}
        self.takes = set(inspect.signature(self.pipeline.__call__).parameters)
        self._check()
        self.facts = {
            "method": f"diffusers:{self.name}",
            "method_sha256": folder_sha256(folder),
            "dtype": dtype,
            "steps": steps,
            "guidance": guidance,
        }

    def _check(self) -> None:
        """Raise GenerateError unless the pipeline inpaints, and takes what was set."""
        lacking = [name for name in DIFFUSERS if name not in self.takes]
        if lacking:
            raise GenerateError(
                f"{self.name} takes no {' and no '.join(lacking)}, so it does not inpaint. Give a "
                "pipeline for inpainting, or write python:FILE:FUNCTION around this one."
            )
        for option, name in (("steps", "num_inference_steps"), ("guidance", "guidance_scale")):
            if self.settings[name] is not None and name not in self.takes:
                raise GenerateError(f"{self.name} takes no {name}; leave --{option} out.")

    def __call__(self, requests: Sequence[Request]) -> list[Any]:
        height, width = requests[0].photo.height, requests[0].photo.width
        wanted = {**self.settings, "height": height, "width": width}
        settings = {}
        for name, value in wanted.items():
            if value is not None and name in self.takes:
                settings[name] = value
        output = self.pipeline(
            prompt=[request.text for request in requests],
            image=[request.photo for request in requests],
            mask_image=[request.hole for request in requests],
            generator=[request.generator for request in requests],
            **settings,
        )
        flagged = getattr(output, "nsfw_content_detected", None) or [False] * len(requests)
        made = []
        for picture, is_hidden in zip(output.images, flagged, strict=True):
            hidden = SampleError("hidden", f"the safety checker of {self.name} blackened it")
            made.append(hidden if is_hidden else picture)
        return made


def model_folder(model: str) -> Path:
    """Where a model lies; one that is not on this machine is downloaded by diffusers."""
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise GenerateError(
            f"diffusers cannot be imported ({error}). Install it with: "
            f"{how_to_install('requirements-diffusers.txt')}"
        ) from error
    if Path(model, "model_index.json").is_file():
        return Path(model)
    if Path(model).exists():
        raise GenerateError(
            f"{model} has no model_index.json; expected the folder of a diffusers pipeline."
        )
    try:
        return Path(DiffusionPipeline.download(model))
    except Exception as error:  # of the network, of the hub, of the file system
        raise GenerateError(
            f"{model} is no folder here and cannot be had from Hugging Face ({first_line(error)}). "
            "Check the name and the network, or give the folder of a pipeline."
        ) from error


def _pipeline(model: str, folder: Path, dtype: torch.dtype) -> Any:
    """The pipeline for inpainting, else the one that the folder names."""
    from diffusers import AutoPipelineForInpainting, DiffusionPipeline

    class Either:
        @staticmethod
        def from_pretrained(folder: Path, **options) -> Any:
            try:
                return AutoPipelineForInpainting.from_pretrained(folder, **options)
            except ValueError:  # it knows no pipeline for inpainting of this family
                return DiffusionPipeline.from_pretrained(folder, **options)

    return load_pipeline(Either, model, folder, dtype)


def load_pipeline(kind: Any, model: str, folder: Path, dtype: torch.dtype) -> Any:
    """A pipeline by its class's from_pretrained; raises GenerateError."""
    try:
        return kind.from_pretrained(folder, torch_dtype=dtype)
    except Exception as error:  # whatever is wrong with a file of it
        raise GenerateError(
            f"diffusers cannot load {model} ({first_line(error)}). Download it again, or take a "
            "version of diffusers that knows it."
        ) from error


def folder_sha256(folder: Path) -> str:
    """Of the names and contents of all files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and ".cache" not in path.parts:
            digest.update(path.relative_to(folder).as_posix().encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
