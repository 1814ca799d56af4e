"""The door to ComfyUI's internals: folders, messages, memory, and what its models must be like to fit."""

import gc
import logging
import os
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Callable

import comfy.ldm.modules.attention
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.supported_models
import comfy.utils
import folder_paths
import torch

from ..cat_core import weights
from ..cat_core.config import Architecture, RefAdapterConfig
from ..cat_core.training.loop import TrainingError
from ..cat_core.training.manifest import ManifestError
from ..cat_core.weights import Checkpoint, WeightsError

FOLDER = "cat_diffusion"
ANY_SIGMA = 999999999  # what the host calls the noise level before sampling starts
BATCH = 16  # pictures that go through CLIP and SemInpainter at once

log = logging.getLogger(__name__)


# Files --------------------------------------------------------------------------------------------------------------


def register_folder() -> None:
    """Make models/cat_diffusion known, keeping paths that the user configured for it, and the pack's own demo model."""
    own = os.path.join(folder_paths.models_dir, FOLDER)
    bundled = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "models")
    paths = folder_paths.folder_names_and_paths.get(FOLDER, ([],))[0]
    folder_paths.folder_names_and_paths[FOLDER] = (list(dict.fromkeys([*paths, own, bundled])), {".safetensors", ".ckpt"})
    try:
        os.makedirs(own, exist_ok=True)
    except OSError as error:
        log.warning("CAT-Diffusion: cannot create %s (%s); create it yourself for CAT files.", own, error)


def list_files(usable: Callable[[set[str]], bool], pickles: bool = False) -> list[str]:
    """Names of the files in models/cat_diffusion whose parts are `usable`; what a pickle holds only reading it tells."""
    def fits(name: str) -> bool:
        path = folder_paths.get_full_path(FOLDER, name)
        if path is None or not name.lower().endswith(".safetensors"):
            return pickles and path is not None
        status = os.stat(path)
        return usable(_parts_inside(path, status.st_mtime_ns, status.st_size))

    return [name for name in folder_paths.get_filename_list(FOLDER) if fits(name)]


@lru_cache(maxsize=1000)
def _parts_inside(path: str, mtime: int, size: int) -> set[str]:
    return weights.parts_inside(path)


def missing_file(name: str | None, what: str) -> str | None:
    """A sentence about a file that is not there, or None. `name` is None where another node supplies it."""
    if name is None or folder_paths.get_full_path(FOLDER, name) is not None:
        return None
    return (f"There is no {name} in {' or '.join(folder_paths.get_folder_paths(FOLDER))}. Put {what} there and press R, or choose "
            "another file; cat_demo_model.safetensors, a small demo model, comes with the pack.")


def fingerprint(name: str) -> tuple:
    """Changes when the file does."""
    status = os.stat(_path(name))
    return _path(name), status.st_mtime_ns, status.st_size


def read(name: str) -> Checkpoint:
    """Read and check a file of models/cat_diffusion; raises WeightsError."""
    return read_path(_path(name))


def _path(name: str) -> str:
    return folder_paths.get_full_path_or_raise(FOLDER, name)


def new_path(filename_prefix: str) -> str:
    """A name in models/cat_diffusion that no file has yet, counted up as the host's own savers do."""
    root = folder_paths.get_folder_paths(FOLDER)[0]
    if os.path.basename(os.path.normpath(filename_prefix)).strip(". ") == "":
        raise ValueError(f"filename_prefix is {filename_prefix!r}; expected the beginning of a file's name, such as my_cat.")
    try:
        os.makedirs(root, exist_ok=True)
        folder, name, counter, *_ = folder_paths.get_save_image_path(filename_prefix, root)
    except OSError as error:
        raise ValueError(f"Cannot write to {root} ({error.strerror}). Check the folder's permissions.") from error
    except Exception as error:  # the host's way to refuse a path
        raise ValueError(f"filename_prefix {filename_prefix!r} leads out of {root}. Give a name, or subfolder/name.") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} is read-only; the weights go there. Check its permissions.")
    return os.path.join(folder, f"{name}_{counter:05}_.safetensors")


def input_folders() -> list[str]:
    """All subfolders of the host's input folder."""
    return folder_paths.get_input_subfolders()


def input_folder(name: str) -> tuple[Path, tuple]:
    """A subfolder of the host's input folder, and a fingerprint of the files below it; nothing may lead out of it."""
    root = Path(folder_paths.get_input_directory()).resolve()
    path, files = Path(root, name), []
    if not name.strip() or path.resolve() == root or not path.resolve().is_relative_to(root):
        raise ValueError(f"{name!r} is not a subfolder of {root}. Put the examples into a folder of their own in there.")
    if not path.is_dir():
        raise ValueError(f"There is no folder {name} in {root}. Put the examples there and press R to refresh the list.")
    path = path.resolve()
    for parent, folders, names in os.walk(path):
        for found in (Path(parent, name) for name in folders + names):
            if not found.resolve().is_relative_to(path):
                raise ValueError(f"{found} is a link to something outside of {path}. Copy the files into the folder instead.")
        for found in (Path(parent, name) for name in names):
            status = found.lstat()
            files.append((str(found.relative_to(path)), status.st_size, status.st_mtime_ns))
    return path, tuple(sorted(files))


def read_path(path) -> Checkpoint:
    """As `read`, by path; NaN and Inf show when a part is built. The host's own reader where it streams weights to the GPU
    itself, or was told not to map files."""
    copies = comfy.utils.DISABLE_MMAP
    own = copies or comfy.memory_management.aimdo_enabled
    return weights.read(path, (lambda path: comfy.utils.load_torch_file(path, return_metadata=True)) if own else None,
                        mapped=not copies, numbers=False)


@contextmanager
def collector_paused():
    """Without Python's garbage collector: building makes many objects that stay, and a full pass over all of the host's takes
    a fifth of a second."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


# Talking to the user ------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Show a sentence on the node that is running, and in the log."""
    from comfy_execution.utils import get_executing_context

    log.info("CAT-Diffusion: %s", text)
    context = get_executing_context()
    if context is not None:
        from server import PromptServer

        server = getattr(PromptServer, "instance", None)
        if server is not None:
            server.send_progress_text(text, context.node_id)


@contextmanager
def plain_errors():
    """Raise the core's errors as ValueError: the host puts the module path of other classes before the sentence."""
    try:
        yield
    except (WeightsError, ManifestError, TrainingError) as error:
        raise ValueError(str(error)) from error


def progress_bar(total: int) -> comfy.utils.ProgressBar:
    """The bar on the node that is running."""
    return comfy.utils.ProgressBar(total)


def chunks(total: int):
    """Slices of at most BATCH rows, with progress on the node; raises where the user has pressed Cancel."""
    bar = progress_bar(total)
    for start in range(0, total, BATCH):
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield slice(start, min(start + BATCH, total))
        bar.update(BATCH)


# CAT models ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CatModel:
    """What travels on a CAT_MODEL wire: the parts of one file, each in a ModelPatcher, or None."""

    name: str
    architecture: Architecture
    sem_inpainter: comfy.model_patcher.ModelPatcher | None = None
    ref_adapter: comfy.model_patcher.ModelPatcher | None = None

    def __str__(self):
        return f"{self.name}: {weights.describe(part for part in ('sem_inpainter', 'ref_adapter') if getattr(self, part))}"


def require_part(cat_model: CatModel, part: str) -> None:
    """Raise unless `cat_model` has the part."""
    if getattr(cat_model, part) is None:
        raise ValueError(f"This CAT model has no {weights.TITLES[part]}: {cat_model}. Load a file that has one.")


def part_tensors(cat_model: CatModel | None, part: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Copies of a part's tensors on the CPU; empty where there is no such part."""
    patcher = cat_model and getattr(cat_model, part)
    tensors = patcher.model.state_dict() if patcher else {}
    return {key: tensor.detach().to("cpu", dtype, copy=True) for key, tensor in tensors.items()}


def run_sem_inpainter(cat_model: CatModel, patches, image, text, patch_mask) -> torch.Tensor:
    """Predicted patch features (B, N, D), computed where the host wants it, returned where it keeps results.

    Takes SemInpainter's own inputs; one text for all pictures.
    """
    patcher = cat_model.sem_inpainter
    config = cat_model.architecture.sem_inpainter
    activations = 8 * min(BATCH, len(patches)) * (config.grid_size**2 + 2) * config.intermediate_size * 4  # bytes
    comfy.model_management.load_models_gpu([patcher], memory_required=activations)
    predicted = []
    for rows in chunks(len(patches)):
        inputs = (patches[rows], image[rows], text.expand(len(patches[rows]), -1), patch_mask[rows])
        output = patcher.model(*(t.to(patcher.load_device) for t in inputs))
        predicted.append(output.patches.to(comfy.model_management.intermediate_device()))
    return torch.cat(predicted)


def clear_memory() -> None:
    """Take all models off the GPU; the host loads them again when it needs them."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


# CLIP ---------------------------------------------------------------------------------------------------------------


def check_clip_vision(clip_vision, width: int | None = None, grid: int = 16) -> None:
    """Raise unless this is a CLIP ViT with that many features and patches."""
    config = getattr(clip_vision, "config", {})
    found_width, found_grid = config.get("hidden_size"), config.get("image_size", 0) // config.get("patch_size", 14)
    found = f"{config.get('model_type', 'unknown')} with {found_width} features on a {found_grid}x{found_grid} grid"
    if config.get("model_type") != "clip_vision_model" or found_grid != grid or width not in (None, found_width):
        raise ValueError(f"This CLIP vision model does not fit: found {found}, expected clip_vision_model with "
                         f"{width or 1024} features on a {grid}x{grid} grid. Load CLIP ViT-L/14 at 224 pixels.")


def clip_vision_sizes(clip_vision) -> tuple[int, int, int]:
    """Width, layers and attention heads."""
    return tuple(clip_vision.config[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))


def encode_image(clip_vision, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 3, 224, 224) uint8 -> patch features (B, N, D) before, and image feature (B, D) after post-layernorm."""
    output = clip_vision.encode_image(pixels.movedim(1, -1).float() / 255, crop=False)
    hidden = output["last_hidden_state"].float()  # (B, N + 1, D)
    norm = clip_vision.model.vision_model.post_layernorm
    return hidden[:, 1:], norm(hidden[:, 0].to(clip_vision.load_device)).float().to(hidden.device)


def encode_text(clip, text: str, width: int | None = None) -> torch.Tensor:
    """Plain text -> CLIP's pooled, unprojected feature (1, T), of its first 77 tokens; raises if T is not `width`."""
    _, pooled = clip.encode_from_tokens(plain_tokens(clip, text), return_pooled="unprojected")
    if pooled is None or width not in (None, pooled.shape[1]):
        raise ValueError(f"This CLIP's text feature is {0 if pooled is None else pooled.shape[1]} wide, the SemInpainter "
                         f"expects {width}. Use the CLIP that belongs to the CAT file.")
    return pooled.float()


def text_similarity(clip, clip_vision, prompt) -> torch.Tensor | None:
    """Cosine of each cell's features and the text of a visual prompt in CLIP's common space, (B, N).

    None where one of the two has no projection into it. The host leaves a projection that a file lacks as it finds the
    memory, so its spread has to be a trained one's, near 1 / sqrt(width).
    """
    transformer = clip.cond_stage_model.clip_l.transformer if set(clip.tokenize("")) == {"l"} else None
    projections = [getattr(transformer, "text_projection", None), getattr(clip_vision.model, "visual_projection", None)]
    weights_ = [getattr(projection, "weight", None) for projection in projections]
    if any(weight is None or not 0.25 < weight.float().std().item() * weight.shape[1] ** 0.5 < 4 for weight in weights_):
        return None
    _, text = clip.encode_from_tokens(plain_tokens(clip, prompt.text), return_pooled=True)
    comfy.model_management.load_model_gpu(clip_vision.patcher)
    cells = projections[1](clip_vision.model.vision_model.post_layernorm(prompt.after.to(clip_vision.load_device))).float().cpu()
    if cells.shape[2] != text.shape[1]:
        return None
    return torch.nn.functional.cosine_similarity(cells, text.float().cpu().view(1, 1, -1), dim=2)


def plain_tokens(clip, text: str) -> dict[str, list]:
    """The first 77 tokens of a text as it is: no weights, no embeddings, no escapes, which the host would read in it."""
    encoders = set(clip.tokenize(""))
    if encoders != {"l"}:
        raise ValueError(f"This CLIP is not SD 1.5's: it has the text encoders {', '.join(sorted(encoders))}, expected l "
                         "(CLIP ViT-L/14) alone. Use the CLIP of an SD 1.5 checkpoint.")
    ids = clip.tokenizer.clip_l.tokenizer(text, padding="max_length", truncation=True, max_length=77)["input_ids"]
    return {"l": [[(id, 1.0) for id in ids]]}


# The U-Net ----------------------------------------------------------------------------------------------------------


def check_unet(model, config: RefAdapterConfig) -> None:
    """Raise unless `model` is an SD 1.5 inpainting model whose transformer blocks are those of the adapter."""
    unet, kind = model.model.diffusion_model, type(model.model).__name__
    blocks = {name: module.norm1.normalized_shape[0] for name, module in unet.named_modules()
              if isinstance(module, comfy.ldm.modules.attention.BasicTransformerBlock)}
    if not isinstance(unet, comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel) or blocks != dict(config.blocks):
        raise ValueError(f"RefAdapter does not fit this model ({kind}, {len(blocks)} transformer blocks); it was made for "
                         f"a U-Net with {len(config.blocks)} blocks. Load an SD 1.5 inpainting checkpoint.")
    channels = unet.in_channels
    if channels != 9:
        raise ValueError(f"This model is not for inpainting: its U-Net takes {channels} channels, expected 9. "
                         "Load an SD 1.5 inpainting checkpoint.")


def check_trainable(model) -> None:
    """Raise unless `model` is of SD 1.5's family and free of a visual prompt."""
    if not isinstance(model.model.model_config, comfy.supported_models.SD15):
        raise ValueError(f"RefAdapter cannot be trained for this model ({type(model.model.model_config).__name__}). "
                         "Load an SD 1.5 inpainting checkpoint.")
    if model.model_options.get("transformer_options", {}).get("patches", {}).get("middle_patch"):
        raise ValueError("This model looks at a visual prompt already. Connect the model from before CAT Apply RefAdapter.")


def check_context(model, context: torch.Tensor) -> None:
    """Raise unless the U-Net reads texts of that width, (B, L, T)."""
    width = next(tensor.shape[1] for key, tensor in model.model.diffusion_model.state_dict().items()
                 if key.endswith(".attn2.to_k.weight"))
    if width != context.shape[2]:
        raise ValueError(f"This CLIP's text is {context.shape[2]} wide, the model reads {width}. Use the model's own CLIP.")


def unet_heads(model) -> int:
    """Attention heads in every block of an SD 1.5 model."""
    return model.model.model_config.unet_config["num_heads"]


def compute_dtype(model) -> torch.dtype:
    """What the U-Net's hidden states are in."""
    return model.get_model_object("manual_cast_dtype") or model.model.get_dtype()


def block_name(extra_options: dict) -> str:
    """The official name of the transformer block that calls a patch."""
    kind, number = extra_options["block"][:2]
    parent = "middle_block" if kind == "middle" else f"{kind}_blocks.{number}"
    return f"{parent}.1.transformer_blocks.{extra_options['block_index']}"


def percent_to_sigma(model, percent: float) -> float:
    """The noise level at a share of the sampling, as the host counts it."""
    return float(model.get_model_object("model_sampling").percent_to_sigma(percent))


def trained_sigmas(model) -> torch.Tensor:
    """The noise levels the model was trained on, ascending, (1000,) float32."""
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete):
        raise ValueError(f"The official schedule needs a model with discrete noise levels such as SD 1.5; this one is "
                         f"{type(model.model).__name__}. Use its own scheduler.")
    return sampling.sigmas.float().cpu()


def vae_cell(vae) -> int:
    """Pixels along one side of a latent cell; raises for a VAE of another family."""
    if vae.latent_channels != 4:
        raise ValueError(f"This VAE makes latents of {vae.latent_channels} channels; SD 1.5 needs 4. Use SD 1.5's VAE.")
    return vae.spacial_compression_encode()
