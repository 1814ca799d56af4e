"""Patches of the U-Net: where they stand, what they are told, and attention."""

import comfy.ldm.modules.attention
import torch

# comfy/ldm/modules/attention.py:952 (middle_patch): between self-attention and text
# cross-attention. Without it there is no RefAdapter in the host.
MIDDLE_PATCH = "middle_patch"

# comfy/samplers.py:615 (cond): a chunk of the positive prompt; see chunks_of_batch.
POSITIVE = 0

# comfy/samplers.py:615 (uncond_): a chunk of the negative prompt.
NEGATIVE = 1


class Patch:
    """What the host asks of an object that patches its U-Net.

    comfy/model_patcher.py:785 (model_patches_models), comfy/model_patcher.py:764
    (model_patches_to) and comfy/model_patcher.py:809 (cleanup). Without them weights of a patch
    stay where they are, or what a patch remembers of a sampling stays for the next.
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

    comfy/model_patcher.py:661 (set_model_patch); there is no setter by this patch's name. Without
    it there is no RefAdapter in the host.
    """
    model.set_model_patch(patch, MIDDLE_PATCH)


def middle_patches(model) -> list:
    """The patches that a MODEL has there.

    comfy/model_patcher.py:662 (transformer_options). Without it a model that looks at a visual
    prompt could be trained.
    """
    options = model.model_options.get("transformer_options", {})
    return options.get("patches", {}).get(MIDDLE_PATCH, [])


def unet_options(middle_patches: list, attention) -> dict:
    """Options for a call of the U-Net itself, with another function for its attention.

    comfy/ldm/modules/attention.py:158 (optimized_attention_override): attention(default, q, k, v,
    heads, ...). Without it the training runs the host's choice for inference, which may have no
    backward pass.
    """
    return {
        "patches": {MIDDLE_PATCH: middle_patches},
        "optimized_attention_override": attention,
    }


def sampler_options(model, kinds: list[int], sigmas: torch.Tensor | None = None) -> dict:
    """Options for a call of a MODEL's U-Net as a sampler would call it, with its patches.

    comfy/samplers.py:323 (cond_or_uncond) and comfy/samplers.py:325 (sigmas). Without them one
    step alone can neither be compared nor counted.

    Args:
        kinds: POSITIVE or NEGATIVE for each equal chunk of the batch.
        sigmas: noise level of each row; None leaves it out.
    """
    options = {**model.model_options["transformer_options"], "cond_or_uncond": kinds}
    if sigmas is not None:
        options["sigmas"] = sigmas
    return options


def call_unet(unet, x, timesteps, context, options: dict) -> torch.Tensor:
    """The U-Net's prediction by options of unet_options or sampler_options.

    comfy/ldm/modules/diffusionmodules/openaimodel.py:837 (transformer_options). Without it there is
    neither training nor a comparison with the official code.
    """
    return unet(x, timesteps, context=context, transformer_options=options)


def calling_block(extra_options: dict) -> tuple[str, int, int]:
    """("input", "middle" or "output"; number of the block; number of the transformer block in it).

    comfy/ldm/modules/diffusionmodules/openaimodel.py:879 (block) and
    comfy/ldm/modules/attention.py:1057 (block_index). Without them a patch cannot know which
    RefAdapter is its own.
    """
    kind, number = extra_options["block"][:2]
    return kind, number, extra_options["block_index"]


def chunks_of_batch(extra_options: dict) -> list[tuple[int, object]]:
    """(POSITIVE or not, id of the condition) for each equal chunk of the batch, in its order.

    comfy/samplers.py:323 (cond_or_uncond) and comfy/samplers.py:324 (uuids). Without them the
    negative prompt would look at the visual prompt, too.
    """
    kinds = extra_options.get("cond_or_uncond", [POSITIVE])
    ids = extra_options.get("uuids", kinds)
    return list(zip(kinds, ids, strict=False))


def kinds_of_batch(extra_options: dict) -> list[int]:
    """POSITIVE or NEGATIVE for each equal chunk of the batch, in its order.

    comfy/samplers.py:323 (cond_or_uncond). See chunks_of_batch.
    """
    return [kind for kind, _ in chunks_of_batch(extra_options)]


def noise_levels(extra_options: dict) -> torch.Tensor | None:
    """The sigmas of a call, one tensor object for all blocks; None outside of a sampling.

    comfy/samplers.py:325 (sigmas). Without it start_percent and end_percent have no effect.
    """
    return extra_options.get("sigmas")


def options_to_repeat(extra_options: dict) -> dict:
    """What a patch has to be told to be called again: its block and the chunks of the batch.

    comfy/ldm/modules/diffusionmodules/openaimodel.py:879 (block). Without it the adapters cannot be
    measured without their U-Net. See calling_block and chunks_of_batch.
    """
    names = ("block", "block_index", "cond_or_uncond")
    return {name: extra_options[name] for name in names}


def inpaint_values(masked_latent: torch.Tensor, mask: torch.Tensor) -> dict:
    """What a CONDITIONING carries for the 5 additional channels of an inpainting U-Net.

    comfy/model_base.py:265 (concat_mask) and comfy/model_base.py:266 (concat_latent_image).
    Without them the U-Net sees no photo.
    """
    return {"concat_latent_image": masked_latent, "concat_mask": mask}


def fastest_attention(q, k, v, heads: int):
    """The attention the host chooses for a U-Net.

    comfy/ldm/modules/attention.py:756 (optimized_attention): the host puts its choice under this
    name, hence no import of the name. Without it RefAdapter is slower than the U-Net around it.
    """
    return comfy.ldm.modules.attention.optimized_attention(q, k, v, heads)


def attention_name() -> str:
    """The function that the host computes attention with.

    comfy/ldm/modules/attention.py:756 (optimized_attention). See fastest_attention.
    """
    return comfy.ldm.modules.attention.optimized_attention.__name__


def differentiable_attention(*args, **kwargs):
    """PyTorch's attention, which has a memory-efficient backward pass.

    comfy/ldm/modules/attention.py:505 (attention_pytorch). The host's choice for inference may
    have no backward pass.
    """
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


def clip_attention(q, k, v, heads: int):
    """The attention the host chooses for CLIP.

    comfy/ldm/modules/attention.py:795 (optimized_attention_for_device). SemInpainter is as large
    and in fp32, which the faster kinds refuse layer by layer.
    """
    choose = comfy.ldm.modules.attention.optimized_attention_for_device
    return choose(q.device, small_input=True)(q, k, v, heads)
