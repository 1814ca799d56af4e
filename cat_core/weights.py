"""Weight files: official CAT-Diffusion checkpoints, CAT weights files and ordinary inpainting checkpoints.

Every reader returns the same thing, a Checkpoint of named parts. Loading is strict and never runs code.
"""

import os
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Callable, Iterable, Mapping, Sequence

import safetensors
import safetensors.torch
import torch

from .config import Architecture, ArchitectureError, RefAdapterConfig, SemInpainterConfig, Tensors
from .models.ref_adapter import RefAdapter
from .models.sem_inpainter import SemInpainter

FORMAT = "cat-diffusion"
FORMAT_VERSION = 1

# Part -> its prefix in the official checkpoint. RefAdapter sits between the U-Net's own keys.
PREFIXES = {
    "sem_inpainter": "fusion_model.",
    "ref_adapter": "model.diffusion_model.",
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "clip_text": "cond_stage_model.transformer.",
    "clip_vision": "cond_stage_model2.encoder.",
}
TITLES = {"sem_inpainter": "SemInpainter", "ref_adapter": "RefAdapter", "unet": "U-Net", "vae": "VAE",
          "clip_text": "CLIP text encoder", "clip_vision": "CLIP vision encoder"}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Keys that hold no weights: the noise schedule, an EMA copy, constant indices, logit buffers.
_SCHEDULE = {"betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
             "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
             "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
             "lvlb_weights", "logvar"}


class WeightsError(ValueError):
    """A file that cannot be used; the message names it, says what was found and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by part, each without its prefix, and the architecture they have."""

    path: Path
    parts: Mapping[str, Tensors]
    architecture: Architecture
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file's name, for messages."""
        return self.path.name

    def require(self, *parts: str) -> None:
        """Raise WeightsError unless every named part is here."""
        missing = [TITLES[part] for part in parts if part not in self.parts]
        if missing:
            raise WeightsError(f"{self.name} holds {describe(self.parts)}, but no {' and no '.join(missing)}. "
                               "Choose a file that has it.")

    def checked(self, part: str) -> dict[str, torch.Tensor]:
        """The tensors of a part; WeightsError if one of them contains NaN or Inf. Reads all of them once."""
        tensors = dict(self.parts[part])
        if not _finite(*tensors.values()):
            key = next(key for key, tensor in tensors.items() if not _finite(tensor))
            raise WeightsError(f"{key} of the {TITLES[part]} in {self.name} contains NaN or Inf. "
                               "The file is damaged or its training diverged; use another.")
        return tensors

    def without(self, *parts: str) -> "Checkpoint":
        """The rest; the file's pages of `parts` leave the memory with the last that holds their tensors."""
        return replace(self, parts={part: tensors for part, tensors in self.parts.items() if part not in parts})


def describe(parts: Iterable[str]) -> str:
    """"SemInpainter and RefAdapter", for messages."""
    parts = set(parts)
    titles = [TITLES[part] for part in PREFIXES if part in parts]
    return " and ".join(filter(None, (", ".join(titles[:-1]), titles[-1]))) if titles else "nothing of CAT-Diffusion"


# Reading ------------------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike, reader: Callable | None = None, mapped: bool = True, inert_objects: bool = False,
         numbers: bool = True) -> Checkpoint:
    """Read any file this module knows, check it and sort it into parts.

    A mapped file is mapped once a part, when the part is wanted, so that its pages are in memory only while it is built.

    Args:
        path: `.safetensors`, or a PyTorch pickle (`.ckpt`, `.pt`, `.pth`, `.bin`), bare or Lightning's.
        reader: a host's own reader of safetensors, path -> (tensors, metadata).
        mapped: whether the reader maps the file; False if it copies.
        inert_objects: read a pickle with foreign objects by putting empty placeholders in their place.
            Nothing named in the file is imported or called either way.
        numbers: look for NaN and Inf now; False if each part's Checkpoint.checked will.
    Raises:
        WeightsError: missing, empty, truncated, mislabelled, with code in it, with unknown, missing or
            misshapen keys, with NaN or Inf, or of another kind altogether.
    """
    path = Path(path)

    def load(keys=None):
        if kind == "pickle":
            return _load_pickle(path, inert_objects)
        return (reader(str(path)) if reader else load_safetensors(str(path), keys))[0]

    kind = _kind(path)
    try:
        tensors, metadata = _header(str(path)) if kind == "safetensors" else (load(), {})
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path.name} is damaged or cut short ({error}). Download or copy it again.") from error
    parts, unknown = sort_keys(tensors)
    if not parts:
        raise WeightsError(f"{path.name} is not a CAT-Diffusion file: none of its {len(tensors)} tensors belongs to a "
                           f"SemInpainter, RefAdapter or Stable Diffusion checkpoint ({_few(unknown) or 'it is empty'}).")
    if unknown:
        raise WeightsError(f"{path.name} has {len(unknown)} keys that are not part of CAT-Diffusion: {_few(unknown)}. "
                           "It may belong to another model.")
    try:
        architecture = _architecture(parts, metadata or {}, path.name)
    except ArchitectureError as error:
        raise WeightsError(f"{path.name}: {error}. The file is incomplete or of another model.") from error
    for part, found in parts.items():
        _check_types(found, path.name, part)
    for part, module in cat_modules(architecture, device="meta").items():
        check_keys({key: value.shape for key, value in module.state_dict().items()}, parts[part], path.name, part)
    if kind == "safetensors" or mapped and zipfile.is_zipfile(path):
        names = sort_keys({key: key for key in tensors})[0]
        if mapped:
            parts = {part: _Mapped(path, names[part], load) for part in parts}
        else:
            found = load()
            parts = {part: {key: found[name] for key, name in names[part].items()} for part in parts}
    file = Checkpoint(path, parts, architecture, metadata or {})
    for part in parts if numbers else ():
        file.checked(part)
    return file


def parts_inside(path: str | os.PathLike) -> set[str]:
    """Which parts a safetensors file holds, by its header alone; none where it is damaged or holds other things, too."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            parts, unknown = sort_keys(dict.fromkeys(file.keys()))
    except (safetensors.SafetensorError, OSError):
        return set()
    return set() if unknown else set(parts)


def sort_keys(tensors: Tensors) -> tuple[dict[str, dict[str, torch.Tensor]], list[str]]:
    """Sort a flat state dict into parts with canonical keys; also return the keys that fit nowhere.

    Drops what is not a weight (schedule buffers, EMA copy, position_ids) and writes both spellings of the CLIP
    keys as Hugging Face's transformers 4 does, with `text_model.` and `vision_model.`. A CLIP vision file of its own,
    without the official prefix, is taken too.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        if key in _SCHEDULE or key.startswith("model_ema.") or key.endswith(".position_ids"):
            continue
        if key.startswith(("vision_model.", "visual_projection.")):
            key = PREFIXES["clip_vision"] + key
        part = next((part for part, prefix in PREFIXES.items() if key.startswith(prefix)), None)
        if part is None:
            unknown.append(key)
            continue
        name = key.removeprefix(PREFIXES[part])
        if part == "ref_adapter" and ".attn3." not in name and ".norm4." not in name:
            part = "unet"
        for clip, level in (("clip_text", "text_model."), ("clip_vision", "vision_model.")):
            if part == clip and not name.startswith((level, "text_projection", "visual_projection")):
                name = level + name
        parts.setdefault(part, {})[name] = tensor
    return parts, unknown


def merge(files: Sequence[Checkpoint]) -> Checkpoint:
    """One Checkpoint of everything that the files hold; of parts that several have, the last one's."""
    parts = {part: tensors for file in files for part, tensors in file.parts.items()}
    facts = {}
    for file in files:
        for name, owner in (("sem_inpainter", "sem_inpainter"), ("ref_adapter", "ref_adapter"), ("unet_num_heads", "unet"),
                            ("clip_text_num_heads", "clip_text"), ("clip_vision_num_heads", "clip_vision")):
            if owner in file.parts:
                facts[name] = getattr(file.architecture, name)
    return Checkpoint(files[0].path, parts, Architecture(**facts), files[0].metadata)


def cat_module(architecture: Architecture, part: str, **kwargs) -> torch.nn.Module:
    """Build a CAT part that `architecture` describes; `kwargs` go to the module (ops, attention, device, dtype)."""
    build = {"sem_inpainter": SemInpainter, "ref_adapter": RefAdapter}[part]
    return build(getattr(architecture, part), **kwargs)


def cat_modules(architecture: Architecture, **kwargs) -> dict[str, torch.nn.Module]:
    """Build all CAT parts that `architecture` describes, as `cat_module`."""
    return {part: cat_module(architecture, part, **kwargs) for part in ("sem_inpainter", "ref_adapter")
            if getattr(architecture, part) is not None}


def check_keys(expected: Mapping[str, torch.Size], tensors: Tensors, name: str, part: str) -> None:
    """Raise WeightsError naming every key of `part` that is missing, extra or of another shape."""
    missing = [key for key in expected if key not in tensors]
    extra = [key for key in tensors if key not in expected]
    shapes = [f"{key} is {tuple(tensors[key].shape)} instead of {tuple(shape)}" for key, shape in expected.items()
              if key in tensors and tensors[key].shape != shape]
    if missing or extra or shapes:
        found = [f"{len(keys)} {what}: {_few(keys)}"
                 for what, keys in (("missing", missing), ("unknown", extra), ("of another shape", shapes)) if keys]
        raise WeightsError(f"The {TITLES[part]} in {name} does not fit: {'; '.join(found)}. "
                           f"Expected the {len(expected)} keys of the official layout.")


def _kind(path: Path) -> str:
    """"safetensors" or "pickle", by content; a name that says otherwise is an error."""
    if not path.is_file():
        raise WeightsError(f"{path} does not exist or is not a file.")
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise WeightsError(f"{path.name} cannot be opened ({error.strerror}). Check its permissions.") from error
    if not head:
        raise WeightsError(f"{path.name} is empty (0 bytes). Download or copy it again.")
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:
        kind = "safetensors"
    elif head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04"):
        kind = "pickle"
    else:
        raise WeightsError(f"{path.name} is not a weights file: it starts with {head[:24]!r}. "
                           "Expected safetensors or a PyTorch checkpoint; download it again.")
    labelled = "safetensors" if path.suffix.lower() in (".safetensors", ".sft") else "pickle"
    if kind != labelled:
        raise WeightsError(f"{path.name} is mislabelled: its content is a {kind} file. "
                           f"Rename it to end in {'.safetensors' if kind == 'safetensors' else '.ckpt'}.")
    return kind


def load_safetensors(path: str, keys: Iterable[str] | None = None) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    """Tensors, all or those of `keys`, memory-mapped, and the header's metadata."""
    with safetensors.safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in (file.keys() if keys is None else keys)}, file.metadata()


def _header(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    """As `load_safetensors`, but the weights are on the meta device: their shapes and types alone."""
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    with safetensors.safe_open(path, framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}
        return {key: torch.empty(found.get_shape(), dtype=types[found.get_dtype()], device="meta")
                if found.get_dtype() in types else file.get_tensor(key) for key, found in slices.items()}, file.metadata()


class _Mapped(Mapping):
    """A part's tensors, in a mapping of the file of their own, made when the first of them is wanted."""

    def __init__(self, path: Path, names: Mapping[str, str], load: Callable):
        self._path, self._names, self._load = path, names, load  # names: key -> name in the file

    @cached_property
    def _tensors(self):
        try:
            found = self._load(self._names.values())
        except (OSError, safetensors.SafetensorError) as error:
            raise WeightsError(f"{self._path.name} was changed or removed while it was read ({error}). Load it again.") from error
        return {key: found[name] for key, name in self._names.items()}

    def __getitem__(self, key):
        return self._tensors[key]

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)


class _Inert:
    """Stands for a foreign class: whatever it is called with, an empty dict comes out (torch fills only dicts)."""

    def __new__(cls, *args, **kwargs):
        return OrderedDict()


def _load_pickle(path: Path, inert_objects: bool) -> dict[str, torch.Tensor]:
    zipped, foreign = zipfile.is_zipfile(path), []
    try:
        if zipped and hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):  # PyTorch 2.6
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if foreign and not inert_objects:
            raise WeightsError(f"{path.name} is a pickle with Python objects besides tensors ({_few(foreign)}), which "
                               "could run code; nothing was run. To take only its tensors, run the pack's converter with "
                               f"ComfyUI's Python: tools/convert.py \"{path}\" --inert-objects "
                               f"--full \"{path.with_suffix('.safetensors')}\"")
        placeholders = [(type("Inert", (_Inert,), {}), name) for name in foreign]
        with torch.serialization.safe_globals(placeholders):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except WeightsError:
        raise
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for what is broken
        reason = "it is damaged or cut short"
        if foreign:
            reason = f"it holds objects that no setting makes safe ({_few(foreign)})"
        elif isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error).upper():
            reason = "it holds Python objects besides tensors, in a form that only its own program can read"
        raise WeightsError(f"{path.name} cannot be read as a PyTorch checkpoint: {reason}; nothing in it was run. "
                           "Get it again, or ask for it as safetensors.") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]  # Lightning's wrapper
    if not isinstance(content, dict):
        raise WeightsError(f"{path.name} holds a {type(content).__name__}, expected a state dict of tensors.")
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}


def _architecture(parts: Mapping[str, Tensors], metadata: Mapping[str, str], name: str) -> Architecture:
    if metadata.get("format") == FORMAT:
        version = metadata.get("format_version", "")
        if not version.isdigit() or int(version) > FORMAT_VERSION:
            raise WeightsError(f"{name} has format version {version or 'none'}, this pack reads up to "
                               f"{FORMAT_VERSION}. Update the pack.")
        architecture = Architecture.from_json(metadata.get("architecture", ""))
        for part, config in (("sem_inpainter", SemInpainterConfig), ("ref_adapter", RefAdapterConfig)):
            described, heads = getattr(architecture, part), None
            if described is not None:
                heads = getattr(described, "num_attention_heads", None) or getattr(described, "num_heads", None)
            found = config.from_tensors(parts[part], heads) if part in parts else None
            if described != found:
                wrong = [field.name for field in fields(config) if getattr(described, field.name, None) != getattr(found, field.name, None)]
                raise ArchitectureError(f"metadata and tensors disagree about the {TITLES[part]} ({_few(wrong)})")
        return architecture
    return Architecture(
        SemInpainterConfig.from_tensors(parts["sem_inpainter"]) if "sem_inpainter" in parts else None,
        RefAdapterConfig.from_tensors(parts["ref_adapter"]) if "ref_adapter" in parts else None)


def _check_types(tensors: Tensors, name: str, part: str) -> None:
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise WeightsError(f"{key} of the {TITLES[part]} in {name} is {str(tensor.dtype).removeprefix('torch.')}, "
                               "expected fp32, fp16 or bf16.")


def _finite(*tensors: torch.Tensor) -> bool:
    """One pass, no copy: NaN and Inf show in the extremes."""
    extremes = [extreme for tensor in tensors if tensor.numel() for extreme in tensor.aminmax()]
    return not extremes or bool(torch.stack(extremes).isfinite().all())


def _few(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# Writing ------------------------------------------------------------------------------------------------------------


def flat(parts: Mapping[str, Tensors]) -> dict[str, torch.Tensor]:
    """Inverse of `sort_keys`: one state dict under the official prefixes."""
    return {PREFIXES[part] + key: tensor for part, tensors in parts.items() for key, tensor in tensors.items()}


def header(parts: Mapping[str, Tensors], architecture: Architecture, *, licence: str, provenance: str) -> dict[str, str]:
    """Header of a file that holds `parts`: what they are, who may use them, and where they come from.

    Raises WeightsError if a part of CAT-Diffusion has no description.
    """
    described = {part: getattr(architecture, part) for part in ("sem_inpainter", "ref_adapter") if part in parts}
    if None in described.values():
        raise WeightsError(f"The architecture of the {' and the '.join(TITLES[part] for part in described)} is not given.")
    architecture = replace(architecture, **{"sem_inpainter": None, "ref_adapter": None, **described})
    return {"format": FORMAT, "format_version": str(FORMAT_VERSION), "architecture": architecture.to_json(),
            "license": licence, "provenance": provenance}


def cat_metadata(parts: Mapping[str, Tensors], architecture: Architecture, **facts: str) -> dict[str, str]:
    """Header of a CAT weights file, see `header`; raises WeightsError if there is nothing of CAT-Diffusion in `parts`."""
    if not {"sem_inpainter", "ref_adapter"} & set(parts):
        raise WeightsError(f"Not a CAT weights file: the tensors are {describe(parts)}, expected a SemInpainter or "
                           "RefAdapter and its architecture.")
    return header(parts, architecture, **facts)


def write_cat_weights(path: str | os.PathLike, parts: Mapping[str, Tensors], architecture: Architecture, *,
                      licence: str, provenance: str, dtype: torch.dtype | None = None, overwrite: bool = False) -> None:
    """Write a CAT weights file: `parts` under their official prefixes, see `cat_metadata` and `save`."""
    save(path, flat(parts), cat_metadata(parts, architecture, licence=licence, provenance=provenance), dtype, overwrite)


def save(path: str | os.PathLike, tensors: Tensors, metadata: Mapping[str, str], dtype: torch.dtype | None = None,
         overwrite: bool = False) -> None:
    """Write safetensors to a temporary name beside `path`, then rename it; an old file stays whole until then."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise WeightsError(f"{path} exists already and was not touched. Choose another name or allow overwriting.")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in tensors.items()}
        for key, tensor in tensors.items():
            if dtype == torch.float16 and not _finite(tensor):
                raise WeightsError(f"{key} does not fit into fp16: it holds numbers beyond 65504 or none at all. Use bf16.")
        safetensors.torch.save_file(tensors, partial, metadata=dict(metadata))
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)  # safetensors makes its files private
        os.replace(partial, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"Cannot write {path}: {error}. Check free space and permissions; "
                           "no other file was touched.") from error
    finally:
        if partial.exists():
            partial.unlink()


def split(checkpoint: Checkpoint) -> tuple[dict[str, torch.Tensor], dict[str, Tensors]]:
    """Split a full checkpoint into (an ordinary SD 1.5 inpainting state dict, the CAT parts).

    The first holds U-Net, VAE and text encoder and no key that a stock loader would not know.
    """
    checkpoint.require("sem_inpainter", "ref_adapter", "unet", "vae", "clip_text")
    base = flat({part: checkpoint.parts[part] for part in ("unet", "vae", "clip_text")})
    return base, {part: checkpoint.parts[part] for part in ("sem_inpainter", "ref_adapter")}
