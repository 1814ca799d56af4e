"""From a checked file to what travels on the host's wires.

The host's own model classes, in the sizes that the file's tensors tell, and CAT's parts in its
ModelPatcher. How the host builds each is a function below; what it does not document, symbols.py.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager

import torch

from ...cat_core import weights
from ...cat_core.config import ArchitectureError, check_heads, heads_of, sizes, unet_blocks
from ...cat_core.features import VisualPrompt
from ...cat_core.models.folded import FoldedRefAdapter
from ...cat_core.weights import Checkpoint, WeightsError, trained_stages
from . import symbols
from .cat_model import CatModel, require_part
from .model_files import read_path

Tensors = dict[str, torch.Tensor]


def build_cat_model(file: Checkpoint) -> CatModel:
    """SemInpainter and RefAdapter, as far as the file has them; raises WeightsError for neither."""
    if not {"sem_inpainter", "ref_adapter"} & set(file.parts):
        file.require("sem_inpainter", "ref_adapter")
    return CatModel(
        file.name,
        file.architecture,
        sem_inpainter=_sem_inpainter(file) if "sem_inpainter" in file.parts else None,
        ref_adapter=_ref_adapter(file) if "ref_adapter" in file.parts else None,
        knowledge=file.knowledge,
        trained=trained_stages.of_header(file.metadata),
    )


def _sem_inpainter(file: Checkpoint, dynamic: bool = True):
    patcher = _cat_patcher(file, "sem_inpainter", symbols.clip_attention, dynamic)
    symbols.set_factory(patcher, _reload, _sem_inpainter, file.path)
    return patcher


def _ref_adapter(file: Checkpoint, dynamic: bool = True):
    patcher = _cat_patcher(file, "ref_adapter", symbols.fastest_attention, dynamic)
    symbols.set_factory(patcher, _reload, _ref_adapter, file.path)
    return patcher


def _cat_patcher(file: Checkpoint, part: str, attention: Callable, dynamic: bool):
    """A part of CAT-Diffusion with the host's operations, in the type of its tensors."""
    tensors = file.checked(part)
    module = weights.cat_module(
        file.architecture,
        part,
        ops=symbols.CASTING_LAYERS,
        attention=attention,
        device=symbols.waiting_device(),
        dtype=_dtype(tensors),
    )
    module.eval().requires_grad_(False)
    symbols.keep_dtypes(module)
    patcher = symbols.new_patcher(module, dynamic)
    module.load_state_dict(tensors, assign=symbols.is_dynamic(patcher))
    return patcher


def build_folded(cat_model: CatModel, visual_prompt: VisualPrompt, dtype: torch.dtype):
    """The RefAdapter with a visual prompt folded in, as the host loads it for sampling.

    Made where the RefAdapter's weights lie, the CPU as a rule: they never go to the GPU.
    """
    adapter = require_part(cat_model, "ref_adapter")
    module = FoldedRefAdapter(adapter.model, visual_prompt.tokens, dtype)
    symbols.keep_dtypes(module)
    return symbols.new_patcher(module)


def build_unet(file: Checkpoint, dynamic: bool = True):
    """The fine-tuned U-Net as an ordinary MODEL, as comfy/sd.py:2043 (unet_dtype) goes on to build
    it."""
    tensors = file.checked("unet")
    config = _unet_config(file, tensors)
    parameters = symbols.parameter_count(tensors)
    dtype = symbols.set_dtypes(config, parameters, _dtype(tensors))
    first_device = symbols.load_device_of_unet(parameters, dtype)
    model = symbols.new_base_model(config, tensors, first_device)
    patcher = symbols.new_patcher(model, dynamic)
    symbols.fill_base_model(model, tensors, assign=symbols.is_dynamic(patcher))
    symbols.set_factory(patcher, _reload, build_unet, file.path)
    if first_device != torch.device("cpu"):
        symbols.load([patcher], wholly=True)
    return patcher


def _unet_config(file: Checkpoint, tensors: Tensors):
    """The host's description of the U-Net; raises WeightsError unless it is for inpainting."""
    with _complete(file, "unet"):
        for _, width in unet_blocks(tensors):
            check_heads(width, file.architecture.unet_num_heads)
        config = symbols.sd15_config(tensors, file.architecture.unet_num_heads)

        def unet():
            return symbols.new_unet(config.unet_config, symbols.LayersWithWeights)

        _expect(file, "unet", unet, tensors)
    channels = config.unet_config["in_channels"]
    if channels != 9:
        raise WeightsError(
            f"The U-Net in {file.name} takes {channels} channels, expected 9. "
            "It is not an inpainting checkpoint."
        )
    return config


def build_clip(file: Checkpoint):
    """The text encoder as an ordinary CLIP, in the precision of the file."""
    tensors = file.checked("clip_text")
    with _complete(file, "clip_text"):
        config = _text_config(file, tensors)
        width = config["hidden_size"]
        # SD 1.5 has no text projection and needs none. The host makes one in any case, in
        # comfy/clip_model.py:198 (text_projection); zeros keep it from reading uninitialised
        # memory.
        zeros = torch.zeros(width, width, dtype=_dtype(tensors))
        tensors.setdefault("text_projection.weight", zeros)

        def text_encoder():
            return symbols.new_text_encoder(config)

        _expect(file, "clip_text", text_encoder, tensors)
    return symbols.new_clip(tensors, config, _dtype(tensors))


def _text_config(file: Checkpoint, tensors: Tensors) -> dict:
    """SD 1.5's own, in the sizes of the tensors; they do not tell the number of heads."""
    (width,) = sizes(tensors, "text_model.final_layer_norm.weight", 1)
    heads = file.architecture.clip_text_num_heads or heads_of(width)
    check_heads(width, heads)
    return symbols.stock_text_config() | {
        "hidden_size": width,
        "num_hidden_layers": _count(tensors, "text_model.encoder.layers."),
        "intermediate_size": sizes(tensors, "text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_attention_heads": heads,
    }


def build_vae(file: Checkpoint):
    """The VAE as an ordinary VAE."""
    tensors = file.checked("vae")
    with _complete(file, "vae"):
        config = _vae_config(tensors)

        def autoencoder():
            return symbols.new_autoencoder(config)

        _expect(file, "vae", autoencoder, tensors)
    return symbols.new_vae(tensors, config)


def _vae_config(tensors: Tensors) -> dict:
    """What AutoencoderKL takes, as in SD 1.5's v1-inference.yaml, in the sizes of the tensors."""
    channels = sizes(tensors, "encoder.conv_in.weight", 4)[0]
    multipliers = []
    for level in range(_count(tensors, "encoder.down.")):
        width = sizes(tensors, f"encoder.down.{level}.block.0.conv1.weight", 4)[0]
        multipliers.append(width // channels)
    latent, embedded, _, _ = sizes(tensors, "post_quant_conv.weight", 4)
    ddconfig = {
        "double_z": True,
        "z_channels": latent,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": channels,
        "ch_mult": multipliers,
        "num_res_blocks": _count(tensors, "encoder.down.0.block."),
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    return {"ddconfig": ddconfig, "embed_dim": embedded}


def build_clip_vision(file: Checkpoint):
    """The image encoder as an ordinary CLIP_VISION, in the precision of the file."""
    tensors = file.checked("clip_vision")
    with _complete(file, "clip_vision"):
        config = _vision_config(file, tensors)

        def image_encoder():
            return symbols.new_image_encoder(config)

        _expect(file, "clip_vision", image_encoder, tensors)
    return symbols.new_clip_vision(config, tensors, _dtype(tensors))


def _vision_config(file: Checkpoint, tensors: Tensors) -> dict:
    """As Hugging Face's config.json of CLIP's image encoder, in the sizes of the tensors."""
    embedding = "vision_model.embeddings"
    width, _, patch, _ = sizes(tensors, f"{embedding}.patch_embedding.weight", 4)
    positions, _ = sizes(tensors, f"{embedding}.position_embedding.weight", 2)  # one is the image's
    grid = math.isqrt(positions - 1)
    if grid < 1 or grid * grid != positions - 1:
        raise ArchitectureError(f"{positions} positions are not one and a square of patches")
    heads = file.architecture.clip_vision_num_heads or heads_of(width)
    check_heads(width, heads)
    config = {
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu",
        "hidden_size": width,
        "image_size": grid * patch,
        "patch_size": patch,
        "num_channels": 3,
        "intermediate_size": sizes(tensors, "vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": _count(tensors, "vision_model.encoder.layers."),
        "num_attention_heads": heads,
    }
    if "visual_projection.weight" in tensors:
        config["projection_dim"] = sizes(tensors, "visual_projection.weight", 2)[0]
    return config


def _reload(build: Callable, path, disable_dynamic: bool = False):
    """Build a part again from its file; the host calls this for copies on other devices."""
    return build(read_path(path), dynamic=not disable_dynamic)


def _expect(file: Checkpoint, part: str, build: Callable, tensors: Tensors) -> None:
    """Compare the keys with those of the host's own class, built without memory."""
    with torch.device("meta"):
        module = build()
    expected = {key: tensor.shape for key, tensor in module.state_dict().items()}
    weights.check_keys(expected, tensors, file.name, part)


@contextmanager
def _complete(file: Checkpoint, part: str):
    """Say what is wrong when an architecture cannot be read off the tensors."""
    try:
        yield
    except WeightsError:
        raise
    except ArchitectureError as error:
        raise WeightsError(
            f"The {weights.TITLES[part]} in {file.name} does not fit: {error}. "
            "The file is damaged or of another model."
        ) from error
    except KeyError as error:
        raise WeightsError(
            f"The {weights.TITLES[part]} in {file.name} lacks {error.args[0]}. "
            "The file is incomplete or of another model."
        ) from error
    # The host's detection and classes raise anything for tensors that are not SD 1.5's.
    except Exception as error:
        raise WeightsError(
            f"The {weights.TITLES[part]} in {file.name} is none of SD 1.5: ComfyUI cannot tell its "
            f"architecture ({type(error).__name__}). Use a checkpoint of SD 1.5 inpainting."
        ) from error


def _count(tensors: Tensors, prefix: str) -> int:
    """How many numbers follow the prefix."""
    numbers = {key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)}
    return len(numbers)


def _dtype(tensors: Tensors) -> torch.dtype:
    return next(iter(tensors.values())).dtype
