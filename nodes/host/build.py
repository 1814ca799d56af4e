"""From a checked file to the objects that travel on the host's wires: its own model classes, of any size, and CAT's."""

import json
import math
import os
import tempfile
from contextlib import contextmanager

import comfy.clip_model
import comfy.clip_vision
import comfy.ldm.models.autoencoder
import comfy.ldm.modules.attention
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch

from ...cat_core import weights
from ...cat_core.config import HEAD_WIDTH
from ...cat_core.features import VisualPrompt
from ...cat_core.models.folded import FoldedRefAdapter
from ...cat_core.weights import Checkpoint, WeightsError
from .cat_model import CatModel
from .model_files import read_path


class _Layers(comfy.ops.disable_weight_init):
    """The host's layers with all their weights; with dynamic VRAM its own have none until a file brings them."""

    class Linear(comfy.ops.disable_weight_init.Linear):
        _load_from_state_dict = (
            torch.nn.Module._load_from_state_dict
        )  # how the host tells who loads for himself


def build_cat_model(file: Checkpoint) -> CatModel:
    """SemInpainter and RefAdapter, as far as the file has them, with the host's operations and attention."""
    parts = [part for part in ("sem_inpainter", "ref_adapter") if part in file.parts]
    if not parts:
        file.require("sem_inpainter", "ref_adapter")
    return CatModel(
        file.name, file.architecture, **{part: _cat_patcher(file, part) for part in parts}
    )


def _cat_patcher(file: Checkpoint, part: str, patcher_class=None):
    tensors = file.checked(part)
    device, offload = (
        comfy.model_management.get_torch_device(),
        comfy.model_management.unet_offload_device(),
    )
    attention = _clip_attention if part == "sem_inpainter" else _attention
    module = (
        weights.cat_module(
            file.architecture,
            part,
            ops=comfy.ops.manual_cast,
            attention=attention,
            device=offload,
            dtype=_dtype(tensors),
        )
        .eval()
        .requires_grad_(False)
    )
    comfy.model_management.archive_model_dtypes(module)
    patcher = (patcher_class or comfy.model_patcher.CoreModelPatcher)(
        module, load_device=device, offload_device=offload
    )
    module.load_state_dict(tensors, assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (_reload, (_cat_patcher, file.path, part))
    return patcher


def build_folded(cat_model: CatModel, visual_prompt: VisualPrompt, dtype: torch.dtype):
    """The RefAdapter with a visual prompt folded in, as the host loads it for sampling.

    Made where the RefAdapter's weights lie, the CPU as a rule: they never go to the GPU.
    """
    module = FoldedRefAdapter(cat_model.ref_adapter.model, visual_prompt.tokens, dtype)
    comfy.model_management.archive_model_dtypes(module)
    return comfy.model_patcher.CoreModelPatcher(
        module,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def _attention(q, k, v, heads):
    return comfy.ldm.modules.attention.optimized_attention(q, k, v, heads)


def _clip_attention(q, k, v, heads):
    """What the host chooses for CLIP: SemInpainter is as large, and in fp32, which its faster kinds refuse layer by layer."""
    return comfy.ldm.modules.attention.optimized_attention_for_device(q.device, small_input=True)(
        q, k, v, heads
    )


def build_unet(file: Checkpoint, patcher_class=None):
    """The fine-tuned U-Net as an ordinary MODEL."""
    tensors = file.checked("unet")
    management = comfy.model_management
    with _complete(file, "unet"):
        config = comfy.supported_models.SD15(comfy.model_detection.detect_unet_config(tensors, ""))
        config.unet_config["num_heads"] = file.architecture.unet_num_heads
        _expect(
            file,
            "unet",
            lambda: comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
                **config.unet_config, operations=_Layers
            ),
            tensors,
        )
    if config.unet_config["in_channels"] != 9:
        raise WeightsError(
            f"The U-Net in {file.name} takes {config.unet_config['in_channels']} channels, expected 9. "
            "It is not an inpainting checkpoint."
        )
    device, parameters = management.get_torch_device(), comfy.utils.calculate_parameters(tensors)
    supported = list(config.supported_inference_dtypes)
    dtype = management.unet_dtype(
        model_params=parameters, supported_dtypes=supported, weight_dtype=_dtype(tensors)
    )
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, supported))
    initial = management.unet_inital_load_device(parameters, dtype)
    model = config.get_model(tensors, "", device=initial)
    patcher = (patcher_class or comfy.model_patcher.CoreModelPatcher)(
        model, load_device=device, offload_device=management.unet_offload_device()
    )
    model.load_model_weights(tensors, "", assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (_reload, (build_unet, file.path))
    if initial != torch.device("cpu"):
        management.load_models_gpu([patcher], force_full_load=True)
    return patcher


def build_clip(file: Checkpoint) -> comfy.sd.CLIP:
    """The text encoder as an ordinary CLIP, in the precision of the file."""
    tensors = file.checked("clip_text")
    with _complete(file, "clip_text"):
        width = tensors["text_model.final_layer_norm.weight"].shape[0]
        with open(
            os.path.join(os.path.dirname(comfy.sd1_clip.__file__), "sd1_clip_config.json")
        ) as stock:
            config = json.load(stock)
        config |= {
            "hidden_size": width,
            "num_hidden_layers": _count(tensors, "text_model.encoder.layers."),
            "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "num_attention_heads": file.architecture.clip_text_num_heads
            or max(width // HEAD_WIDTH, 1),
        }
        # SD 1.5 has no text projection and needs none; zeros keep the host from reading uninitialised memory.
        tensors.setdefault(
            "text_projection.weight", torch.zeros(width, width, dtype=_dtype(tensors))
        )
        _expect(
            file,
            "clip_text",
            lambda: comfy.clip_model.CLIPTextModel(config, None, None, _Layers),
            tensors,
        )
    target = comfy.supported_models_base.ClipTarget(
        comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel
    )
    return comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=comfy.utils.calculate_parameters(tensors),
        state_dict={f"clip_l.transformer.{key}": tensor for key, tensor in tensors.items()},
        model_options={"dtype": _dtype(tensors), "clip_l_model_config": config},
    )


def build_vae(file: Checkpoint) -> comfy.sd.VAE:
    """The VAE as an ordinary VAE."""
    tensors = file.checked("vae")
    with _complete(file, "vae"):
        levels, channels = (
            _count(tensors, "encoder.down."),
            tensors["encoder.conv_in.weight"].shape[0],
        )
        mult = [
            tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // channels
            for i in range(levels)
        ]
        latent, _ = tensors["post_quant_conv.weight"].shape[:2]
        ddconfig = {
            "double_z": True,
            "z_channels": latent,
            "resolution": 256,
            "in_channels": 3,
            "out_ch": 3,
            "ch": channels,
            "ch_mult": mult,
            "num_res_blocks": _count(tensors, "encoder.down.0.block."),
            "attn_resolutions": [],
            "dropout": 0.0,
        }
        params = {"ddconfig": ddconfig, "embed_dim": tensors["post_quant_conv.weight"].shape[1]}
        _expect(file, "vae", lambda: comfy.ldm.models.autoencoder.AutoencoderKL(**params), tensors)
    vae = comfy.sd.VAE(sd=tensors, config={"params": params})
    vae.latent_channels = latent
    vae.downscale_ratio = vae.upscale_ratio = 2 ** (levels - 1)
    return vae


def build_clip_vision(file: Checkpoint) -> comfy.clip_vision.ClipVisionModel:
    """The image encoder as an ordinary CLIP_VISION, in the precision of the file."""
    tensors = file.checked("clip_vision")
    with _complete(file, "clip_vision"):
        width, _, patch, _ = tensors["vision_model.embeddings.patch_embedding.weight"].shape
        side = math.isqrt(len(tensors["vision_model.embeddings.position_embedding.weight"]) - 1)
        config = {
            "model_type": "clip_vision_model",
            "hidden_act": "quick_gelu",
            "hidden_size": width,
            "image_size": side * patch,
            "patch_size": patch,
            "num_channels": 3,
            "intermediate_size": tensors["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": _count(tensors, "vision_model.encoder.layers."),
            "num_attention_heads": file.architecture.clip_vision_num_heads
            or max(width // HEAD_WIDTH, 1),
        }
        if "visual_projection.weight" in tensors:
            config["projection_dim"] = tensors["visual_projection.weight"].shape[0]
        _expect(
            file,
            "clip_vision",
            lambda: comfy.clip_model.CLIPVisionModelProjection(config, None, None, _Layers),
            tensors,
        )
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
    return build(
        read_path(path), *args, comfy.model_patcher.ModelPatcher if disable_dynamic else None
    )


def _expect(file: Checkpoint, part: str, build, tensors) -> None:
    """Compare the keys with those of the host's own class, built without memory."""
    with torch.device("meta"):
        expected = {key: value.shape for key, value in build().state_dict().items()}
    weights.check_keys(expected, tensors, file.name, part)


@contextmanager
def _complete(file: Checkpoint, part: str):
    """Name the key that is missing when an architecture cannot be read off the tensors."""
    try:
        yield
    except KeyError as error:
        raise WeightsError(
            f"The {weights.TITLES[part]} in {file.name} lacks {error.args[0]}. "
            "The file is incomplete or of another model."
        ) from error


def _count(tensors, prefix: str) -> int:
    return len(
        {key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)}
    )


def _dtype(tensors) -> torch.dtype:
    return next(iter(tensors.values())).dtype
