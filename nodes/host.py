"""The only door to ComfyUI's internals: folders, memory, the host's own model classes and what they expect."""

import json
import logging
import math
import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.clip_model
import comfy.clip_vision
import comfy.ldm.models.autoencoder
import comfy.ldm.modules.attention
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch

from ..cat_core import weights
from ..cat_core.config import Architecture, HEAD_WIDTH, RefAdapterConfig
from ..cat_core.weights import Checkpoint, WeightsError

FOLDER = "cat_diffusion"
ANY_SIGMA = 999999999  # what the host calls the noise level before sampling starts
BATCH = 16  # pictures that go through CLIP and SemInpainter at once

log = logging.getLogger(__name__)


# Files --------------------------------------------------------------------------------------------------------------


def register_folder() -> None:
    """Make models/cat_diffusion known, keeping paths that the user configured for it."""
    own = os.path.join(folder_paths.models_dir, FOLDER)
    paths = folder_paths.folder_names_and_paths.get(FOLDER, ([],))[0]
    folder_paths.folder_names_and_paths[FOLDER] = (list(dict.fromkeys([*paths, own])), {".safetensors", ".ckpt"})
    try:
        os.makedirs(own, exist_ok=True)
    except OSError as error:
        log.warning("CAT-Diffusion: cannot create %s (%s); create it yourself for CAT files.", own, error)


def list_files(*suffixes: str) -> list[str]:
    """Names of the files in models/cat_diffusion, optionally only with these endings."""
    return [name for name in folder_paths.get_filename_list(FOLDER) if not suffixes or name.lower().endswith(suffixes)]


def fingerprint(name: str) -> tuple:
    """Changes when the file does."""
    status = os.stat(_path(name))
    return _path(name), status.st_mtime_ns, status.st_size


def read(name: str) -> Checkpoint:
    """Read and check a file of models/cat_diffusion; raises WeightsError."""
    return _read(_path(name))


def _path(name: str) -> str:
    return folder_paths.get_full_path_or_raise(FOLDER, name)


def _read(path) -> Checkpoint:
    return weights.read(path, lambda path: comfy.utils.load_torch_file(path, return_metadata=True))


# Talking to the user ------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Show a sentence on the node that is running, and in the log."""
    from comfy_execution.utils import get_executing_context
    from server import PromptServer

    log.info("CAT-Diffusion: %s", text)
    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if context is not None and server is not None:
        server.send_progress_text(text, context.node_id)


@contextmanager
def plain_errors():
    """Raise a WeightsError as ValueError: the host puts the module path of other classes before the sentence."""
    try:
        yield
    except WeightsError as error:
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


def build_cat_model(file: Checkpoint) -> CatModel:
    """SemInpainter and RefAdapter, as far as the file has them, with the host's operations and attention."""
    parts = [part for part in ("sem_inpainter", "ref_adapter") if part in file.parts]
    if not parts:
        file.require("sem_inpainter", "ref_adapter")
    return CatModel(file.name, file.architecture, **{part: _cat_patcher(file, part) for part in parts})


def _cat_patcher(file: Checkpoint, part: str, patcher_class=None):
    tensors = file.parts[part]
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    module = weights.cat_module(file.architecture, part, ops=comfy.ops.manual_cast, attention=_attention, device=offload,
                                dtype=_dtype(tensors)).eval().requires_grad_(False)
    comfy.model_management.archive_model_dtypes(module)
    patcher = (patcher_class or comfy.model_patcher.CoreModelPatcher)(module, load_device=device, offload_device=offload)
    module.load_state_dict(tensors, assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (_reload, (_cat_patcher, file.path, part))
    return patcher


def _attention(q, k, v, heads):
    return comfy.ldm.modules.attention.optimized_attention(q, k, v, heads)


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


# CLIP ---------------------------------------------------------------------------------------------------------------


def check_clip_vision(clip_vision, width: int | None = None, grid: int = 16) -> None:
    """Raise unless this is a CLIP ViT with that many features and patches."""
    config = getattr(clip_vision, "config", {})
    found_width, found_grid = config.get("hidden_size"), config.get("image_size", 0) // config.get("patch_size", 14)
    found = f"{config.get('model_type', 'unknown')} with {found_width} features on a {found_grid}x{found_grid} grid"
    if config.get("model_type") != "clip_vision_model" or found_grid != grid or width not in (None, found_width):
        raise ValueError(f"This CLIP vision model does not fit: found {found}, expected clip_vision_model with "
                         f"{width or 1024} features on a {grid}x{grid} grid. Load CLIP ViT-L/14 at 224 pixels.")


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


# The host's own models, from a full checkpoint of any size ------------------------------------------------------------


def build_unet(file: Checkpoint, patcher_class=None):
    """The fine-tuned U-Net as an ordinary MODEL."""
    tensors = dict(file.parts["unet"])
    management = comfy.model_management
    with _complete(file, "unet"):
        config = comfy.supported_models.SD15(comfy.model_detection.detect_unet_config(tensors, ""))
        config.unet_config["num_heads"] = file.architecture.unet_num_heads
        _expect(file, "unet", lambda: comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
            **config.unet_config, operations=comfy.ops.disable_weight_init))
    if config.unet_config["in_channels"] != 9:
        raise WeightsError(f"The U-Net in {file.name} takes {config.unet_config['in_channels']} channels, expected 9. "
                           "It is not an inpainting checkpoint.")
    device, parameters = management.get_torch_device(), comfy.utils.calculate_parameters(tensors)
    supported = list(config.supported_inference_dtypes)
    dtype = management.unet_dtype(model_params=parameters, supported_dtypes=supported, weight_dtype=_dtype(tensors))
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, supported))
    initial = management.unet_inital_load_device(parameters, dtype)
    model = config.get_model(tensors, "", device=initial)
    patcher = (patcher_class or comfy.model_patcher.CoreModelPatcher)(
        model, load_device=device, offload_device=management.unet_offload_device())
    model.load_model_weights(tensors, "", assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (_reload, (build_unet, file.path))
    if initial != torch.device("cpu"):
        management.load_models_gpu([patcher], force_full_load=True)
    return patcher


def build_clip(file: Checkpoint) -> comfy.sd.CLIP:
    """The text encoder as an ordinary CLIP, in the precision of the file."""
    tensors = dict(file.parts["clip_text"])
    with _complete(file, "clip_text"):
        width = tensors["text_model.final_layer_norm.weight"].shape[0]
        with open(os.path.join(os.path.dirname(comfy.sd1_clip.__file__), "sd1_clip_config.json")) as stock:
            config = json.load(stock)
        config |= {"hidden_size": width, "num_hidden_layers": _count(tensors, "text_model.encoder.layers."),
                   "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
                   "num_attention_heads": file.architecture.clip_text_num_heads or max(width // HEAD_WIDTH, 1)}
        # SD 1.5 has no text projection; the identity keeps the host from reading uninitialised memory.
        tensors.setdefault("text_projection.weight", torch.eye(width, dtype=_dtype(tensors)))
        _expect(file, "clip_text", lambda: comfy.clip_model.CLIPTextModel(config, None, None, torch.nn), tensors)
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    return comfy.sd.CLIP(target, embedding_directory=folder_paths.get_folder_paths("embeddings"),
                         parameters=comfy.utils.calculate_parameters(tensors),
                         state_dict={f"clip_l.transformer.{key}": tensor for key, tensor in tensors.items()},
                         model_options={"dtype": _dtype(tensors), "clip_l_model_config": config})


def build_vae(file: Checkpoint) -> comfy.sd.VAE:
    """The VAE as an ordinary VAE."""
    tensors = dict(file.parts["vae"])
    with _complete(file, "vae"):
        levels, channels = _count(tensors, "encoder.down."), tensors["encoder.conv_in.weight"].shape[0]
        mult = [tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // channels for i in range(levels)]
        latent, _ = tensors["post_quant_conv.weight"].shape[:2]
        ddconfig = {"double_z": True, "z_channels": latent, "resolution": 256, "in_channels": 3, "out_ch": 3,
                    "ch": channels, "ch_mult": mult, "num_res_blocks": _count(tensors, "encoder.down.0.block."),
                    "attn_resolutions": [], "dropout": 0.0}
        params = {"ddconfig": ddconfig, "embed_dim": tensors["post_quant_conv.weight"].shape[1]}
        _expect(file, "vae", lambda: comfy.ldm.models.autoencoder.AutoencoderKL(**params))
    vae = comfy.sd.VAE(sd=tensors, config={"params": params})
    vae.latent_channels = latent
    vae.downscale_ratio = vae.upscale_ratio = 2 ** (levels - 1)
    return vae


def build_clip_vision(file: Checkpoint) -> comfy.clip_vision.ClipVisionModel:
    """The image encoder as an ordinary CLIP_VISION, in the precision of the file."""
    tensors = dict(file.parts["clip_vision"])
    with _complete(file, "clip_vision"):
        width, _, patch, _ = tensors["vision_model.embeddings.patch_embedding.weight"].shape
        side = math.isqrt(len(tensors["vision_model.embeddings.position_embedding.weight"]) - 1)
        config = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "hidden_size": width,
                  "image_size": side * patch, "patch_size": patch, "num_channels": 3,
                  "intermediate_size": tensors["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
                  "num_hidden_layers": _count(tensors, "vision_model.encoder.layers."),
                  "num_attention_heads": file.architecture.clip_vision_num_heads or max(width // HEAD_WIDTH, 1)}
        if "visual_projection.weight" in tensors:
            config["projection_dim"] = tensors["visual_projection.weight"].shape[0]
        _expect(file, "clip_vision", lambda: comfy.clip_model.CLIPVisionModelProjection(config, None, None, torch.nn))
    with tempfile.TemporaryDirectory() as folder:  # older hosts take a path, not a dict
        path = os.path.join(folder, "config.json")
        with open(path, "w") as out:
            json.dump(config, out)
        clip_vision = comfy.clip_vision.ClipVisionModel(path)
    clip_vision.model.to(_dtype(tensors))
    clip_vision.load_sd(tensors)
    return clip_vision


def _reload(build, path, *args, disable_dynamic: bool = False):
    """Build a part again from its file; the host calls this for copies on other devices."""
    return build(_read(path), *args, comfy.model_patcher.ModelPatcher if disable_dynamic else None)


def _expect(file: Checkpoint, part: str, build, tensors=None) -> None:
    """Compare the file's keys with those of the host's own class, built without memory."""
    with torch.device("meta"):
        expected = {key: value.shape for key, value in build().state_dict().items()}
    weights.check_keys(expected, tensors or file.parts[part], file.name, part)


@contextmanager
def _complete(file: Checkpoint, part: str):
    """Name the key that is missing when an architecture cannot be read off the tensors."""
    try:
        yield
    except KeyError as error:
        raise WeightsError(f"The {weights.TITLES[part]} in {file.name} lacks {error.args[0]}. "
                           "The file is incomplete or of another model.") from error


def _count(tensors, prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)})


def _dtype(tensors) -> torch.dtype:
    return next(iter(tensors.values())).dtype
