"""What the pack uses of the host that no document promises, each in one place.

A function a symbol. Its docstring says what it gives, where the host's source explains it (lines of
ComfyUI 0.30.0), and what breaks if it goes. tests/nodes/test_host_symbols.py asks the running host
for each, so that an update that moves one fails with its name. What every loader and node of the
host itself uses, such as load_models_gpu or clone, is not listed.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.ldm.modules.attention
import comfy.lora
import comfy.memory_management
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
from comfy_execution.utils import get_executing_context

ANY_SIGMA = 999999999  # the noise level at 0 % of a sampling (comfy/model_sampling.py:213)

# --- Weights and memory -----------------------------------------------------------------------


def new_patcher(module: torch.nn.Module, dynamic: bool = True):
    """A ModelPatcher that computes on the GPU and waits where the host keeps its U-Nets.

    comfy/model_patcher.py:2142. main.py:278 puts another class under the name where dynamic VRAM is
    on, hence no import of the name. Without it no part loads.
    """
    kind = comfy.model_patcher.CoreModelPatcher if dynamic else comfy.model_patcher.ModelPatcher
    return kind(
        module,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def is_dynamic(patcher) -> bool:
    """Whether the host pages the weights in by itself, straight from the file's tensors.

    comfy/model_patcher.py:402. Such a module takes the tensors as they are, `assign=True`; without
    it they are copied, and have to fit into memory twice.
    """
    return patcher.is_dynamic()


def keep_dtypes(module: torch.nn.Module) -> None:
    """Let the host remember in which type each weight came.

    comfy/model_management.py:1037. Without it dynamic VRAM computes in the wrong type.
    """
    comfy.model_management.archive_model_dtypes(module)


def set_factory(patcher, build, *arguments) -> None:
    """How the host makes the model again for another device, or without dynamic VRAM.

    comfy/model_patcher.py:430-440: it calls build(*arguments, disable_dynamic=True). Without it
    hooks and more than one GPU are refused.
    """
    patcher.cached_patcher_init = (build, arguments)


def load_device_of_unet(parameters: int, dtype: torch.dtype) -> torch.device:
    """Where the host would have a U-Net of that size built; the typing error is its own.

    comfy/model_management.py:1074. Without it build on unet_offload_device().
    """
    return comfy.model_management.unet_inital_load_device(parameters, dtype)


class LayersWithWeights(comfy.ops.disable_weight_init):
    """The host's layers, which have their weights from the start.

    With dynamic VRAM its Linear has none until a file brings them, and tells who brings his own by
    the identity of this method (comfy/ops.py:497). Without it the keys of a file cannot be
    compared with those of the module.
    """

    class Linear(comfy.ops.disable_weight_init.Linear):
        _load_from_state_dict = torch.nn.Module._load_from_state_dict


def streams_files() -> bool:
    """Whether the host reads weight files by a reader of its own, to page them into the GPU.

    comfy/memory_management.py:173. Without it files are mapped, which is slower with dynamic VRAM.
    """
    return comfy.memory_management.aimdo_enabled


def maps_no_files() -> bool:
    """Whether the user forbade it to map files into memory (--disable-mmap).

    comfy/utils.py:41. Without it the user's setting is ignored.
    """
    return comfy.utils.DISABLE_MMAP


def patched_weights(model, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(key, fp32 copy on the CPU) of a MODEL's weights, with its LoRAs in them.

    comfy/model_patcher.py:858: a key has ((weight, convert), *patches); comfy/lora.py:438. Without
    them a RefAdapter cannot be trained for a MODEL of the host.
    """
    for key, ((weight, convert), *patches) in model.get_key_patches(prefix).items():
        copy = weight.detach().to("cpu", torch.float32, copy=True)
        plain = convert(copy, inplace=True)
        yield key, comfy.lora.calculate_weight(patches, plain, key) if patches else plain


# --- U-Net ------------------------------------------------------------------------------------


def sd15_config(tensors, heads: int):
    """The host's description of an SD 1.5 U-Net of any width, read off its tensors.

    comfy/model_detection.py:44 and comfy/supported_models.py:47. Tensors do not tell the number of
    heads. Without it no U-Net loads.
    """
    config = comfy.supported_models.SD15(comfy.model_detection.detect_unet_config(tensors, ""))
    config.unet_config["num_heads"] = heads
    return config


def model_config(model):
    """The description a MODEL was built by: its class, and `unet_config`.

    comfy/model_base.py:156. Without it heads and family of a U-Net are unknown to the training.
    """
    return model.model.model_config


def compute_dtype(model) -> torch.dtype:
    """What a U-Net's hidden states are in.

    comfy/model_base.py:252. Without it the folded matrices may be of another type than the U-Net.
    """
    return model.get_model_object("manual_cast_dtype") or model.model.get_dtype()


def scale_latent(model, latent: torch.Tensor) -> torch.Tensor:
    """A VAE's latent -> as the U-Net sees it.

    comfy/model_base.py:366. Without it training sees latents at the wrong scale.
    """
    return model.model.process_latent_in(latent)


def vae_cell(vae) -> int:
    """Pixels along one side of a latent cell; the typing error is the host's.

    comfy/sd.py:1370. Without it pictures cannot be cropped to whole cells.
    """
    return vae.spacial_compression_encode()


# --- Patches ----------------------------------------------------------------------------------

MIDDLE_PATCH = "middle_patch"  # between self-attention and text cross-attention


class Patch:
    """What the host asks of an object that patches its U-Net.

    comfy/model_patcher.py:764-824. Without it weights of a patch stay where they are, or what a
    patch remembers of a sampling stays for the next.
    """

    def models(self) -> list:
        """ModelPatchers that are loaded, counted and unloaded with the U-Net."""
        return []

    def to(self, device_or_dtype):
        """The patch itself, moved; another object would not be seen."""
        return self

    def cleanup(self) -> None:
        """Called after each sampling, failed ones too; not before ComfyUI 0.30."""


def add_middle_patch(model, patch) -> None:
    """Let a MODEL's transformer blocks call patch(x, extra_options) -> x, after their others.

    comfy/ldm/modules/attention.py:952; there is no setter by name (comfy/model_patcher.py:661).
    Without it there is no RefAdapter in the host.
    """
    model.set_model_patch(patch, MIDDLE_PATCH)


def middle_patches(model) -> list:
    """The patches that a MODEL has there.

    comfy/model_patcher.py:661. Without it a model that looks at a visual prompt could be trained.
    """
    options = model.model_options.get("transformer_options", {})
    return options.get("patches", {}).get(MIDDLE_PATCH, [])


def unet_options(middle_patches: list, attention) -> dict:
    """Options for a call of the U-Net itself, with another function for its attention.

    comfy/ldm/modules/attention.py:158: attention(default, q, k, v, heads, ...). Without it the
    training runs the host's choice for inference, which may have no backward pass.
    """
    return {
        "patches": {MIDDLE_PATCH: middle_patches},
        "optimized_attention_override": attention,
    }


def calling_block(extra_options: dict) -> tuple[str, int, int]:
    """("input", "middle" or "output"; number of the block; number of the transformer block in it).

    comfy/ldm/modules/diffusionmodules/openaimodel.py:879 and comfy/ldm/modules/attention.py:1057.
    Without it a patch cannot know which RefAdapter is its own.
    """
    kind, number = extra_options["block"][:2]
    return kind, number, extra_options["block_index"]


POSITIVE = 0  # a chunk of the positive prompt; see chunks_of_batch


def chunks_of_batch(extra_options: dict) -> list[tuple[int, object]]:
    """(POSITIVE or not, id of the condition) for each equal chunk of the batch, in its order.

    comfy/samplers.py:323. Without it the negative prompt would look at the visual prompt, too.
    """
    conds = extra_options.get("cond_or_uncond", [POSITIVE])
    ids = extra_options.get("uuids", conds)
    return list(zip(conds, ids, strict=False))


def noise_levels(extra_options: dict) -> torch.Tensor | None:
    """The sigmas of a call, one tensor object for all blocks; None outside of a sampling.

    comfy/samplers.py:325. Without it start_percent and end_percent have no effect.
    """
    return extra_options.get("sigmas")


def inpaint_values(masked_latent: torch.Tensor, mask: torch.Tensor) -> dict:
    """What a CONDITIONING carries for the 5 additional channels of an inpainting U-Net.

    comfy/model_base.py:265. Without it the U-Net sees no photo.
    """
    return {"concat_latent_image": masked_latent, "concat_mask": mask}


def clip_attention(q, k, v, heads: int):
    """The attention the host chooses for CLIP.

    comfy/ldm/modules/attention.py:795. SemInpainter is as large and in fp32, which the faster kinds
    refuse layer by layer.
    """
    choose = comfy.ldm.modules.attention.optimized_attention_for_device
    return choose(q.device, small_input=True)(q, k, v, heads)


# --- CLIP -------------------------------------------------------------------------------------


def stock_text_config() -> dict:
    """The configuration of SD 1.5's text encoder.

    comfy/sd1_clip.py:95. Without it no checkpoint's text encoder loads.
    """
    folder = os.path.dirname(comfy.sd1_clip.__file__)
    with open(os.path.join(folder, "sd1_clip_config.json"), encoding="utf-8") as file:
        return json.load(file)


def new_clip(tensors: dict[str, torch.Tensor], config: dict, dtype: torch.dtype) -> comfy.sd.CLIP:
    """A CLIP with a text encoder of any size; takes keys without a prefix.

    comfy/supported_models_base.py:25, comfy/sd.py:232, and `clip_l_model_config` in
    comfy/sd1_clip.py:105. Without it no checkpoint's text encoder loads.
    """
    target = comfy.supported_models_base.ClipTarget(
        comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel
    )
    return comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=comfy.utils.calculate_parameters(tensors),
        state_dict={f"clip_l.transformer.{key}": tensor for key, tensor in tensors.items()},
        model_options={"dtype": dtype, "clip_l_model_config": config},
    )


def vision_config(clip_vision) -> dict:
    """The configuration of a CLIP_VISION, as in Hugging Face's config.json; empty if it has none.

    comfy/clip_vision.py:42. Without it an encoder that does not fit is noticed late.
    """
    return getattr(clip_vision, "config", {})


def post_layernorm(clip_vision) -> torch.nn.Module:
    """The norm after CLIP vision's last layer.

    comfy/clip_model.py:287. The host gives the image feature projected alone; without this norm
    SemInpainter has no image feature.
    """
    return clip_vision.model.vision_model.post_layernorm


def visual_projection(clip_vision):
    """From CLIP vision's features into CLIP's common space; may be a function without weights.

    comfy/clip_model.py:315. Without it the preview shows no similarity to the text.
    """
    return getattr(clip_vision.model, "visual_projection", None)


def text_projection(clip):
    """From the text encoder's feature into CLIP's common space.

    comfy/sd1_clip.py:716 and comfy/clip_model.py:198. See visual_projection.
    """
    transformer = clip.cond_stage_model.clip_l.transformer
    return getattr(transformer, "text_projection", None)


def token_ids(clip, text: str) -> list[int]:
    """The 77 tokens of a text as it is, by Hugging Face's tokenizer inside the host's.

    comfy/sd1_clip.py:490 and 686. Without it weights, embeddings and escapes in a label would be
    read as such.
    """
    tokenizer = clip.tokenizer.clip_l.tokenizer
    return tokenizer(text, padding="max_length", truncation=True, max_length=77)["input_ids"]


def unprojected_feature(clip, tokens: dict) -> torch.Tensor | None:
    """CLIP's pooled text feature (1, T), before any projection.

    comfy/sd.py:397. SD 1.5's own encoder never projects (comfy/sd1_clip.py:714), other encoders
    of the same name do. Without it SemInpainter would read a projected feature of those.
    """
    _, pooled = clip.encode_from_tokens(tokens, return_pooled="unprojected")
    return pooled


# --- What the user sees -------------------------------------------------------------------------


def show_on_node(text: str) -> None:
    """Show a sentence on the node that is running; nothing where none is.

    comfy_execution/utils.py:18 and server.py:1469. Without it the sentence is in the log alone.
    """
    context = get_executing_context()
    if context is None:
        return
    # Late: tools run without the server, which takes seconds to import and imports `utils` by that
    # common name. Where a node runs, the host has imported it long ago.
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_progress_text(text, context.node_id)


@contextmanager
def no_progress_bars():
    """Without the host's bars in the terminal.

    comfy/utils.py:1254 and nodes.py:1570. Without it a tool's own lines are mixed with them.
    """
    shown = comfy.utils.PROGRESS_BAR_ENABLED
    comfy.utils.PROGRESS_BAR_ENABLED = False
    try:
        yield
    finally:
        comfy.utils.PROGRESS_BAR_ENABLED = shown
