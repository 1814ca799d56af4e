"""What the adapter is sampled beside: stock patches, guiders, samplers, conditionings, batches."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import comfy.hooks
import comfy.sd
import peer_patches
import torch
from comfy_extras import nodes_custom_sampler as stock
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_hooks import ConditioningSetProperties
from stock_guiders import CFG, basic, cfg, dual, perpendicular

from cat_diffusion.nodes.host import symbols
from nodes import (
    ConditioningConcat,
    ConditioningSetMask,
    ConditioningSetTimestepRange,
    ControlNetApplyAdvanced,
    LatentFromBatch,
    RepeatLatentBatch,
)

EQUAL = 2e-5  # of the largest value


def as_cfg(model, prompts):
    return cfg(model, prompts["positive"], prompts["negative"])


@dataclass(frozen=True)
class Row:
    """Something that the adapter goes with.

    Args:
        patch: MODEL -> MODEL.
        guide: MODEL and conditionings by name -> guider.
        prompt: the positive CONDITIONING -> what takes its place.
        looking: names of the conditionings that look at the visual prompt.
        factors: of the visual prompts, a batch of them.
        latent: LATENT -> LATENT.
        steps: of the sampling.
        commutes: whether patch and adapter may change places.
        seen: whether patch or prompt changes anything beside the adapter alone.
        equal: how near the folded adapter comes to the unfolded one.
    """

    name: str
    patch: Callable | None = None
    guide: Callable = as_cfg
    prompt: Callable | None = None
    looking: tuple[str, ...] = ("positive",)
    factors: tuple[float, ...] = (1.0,)
    latent: Callable | None = None
    sampler: str = "euler"
    scheduler: str = "normal"
    steps: int = 2
    commutes: bool = True
    seen: bool = True
    equal: float = EQUAL


# Patches ---------------------------------------------------------------------------------------


def of(module: str, node: str, *values) -> Callable | None:
    """A stock node as MODEL -> MODEL; None where this host has no such node."""
    found = getattr(importlib.import_module(f"comfy_extras.nodes_{module}"), node, None)
    if found is None:
        return None

    def patch(model):
        execute = getattr(found, "execute", None) or found().patch
        out = execute(model, *values)
        return getattr(out, "args", out)[0]

    return patch


def lora_weights():
    """Of one layer of the tiny U-Net."""
    generator = torch.Generator().manual_seed(6)
    layer = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v"
    return {
        f"{layer}.lora_up.weight": torch.randn(64, 4, generator=generator),
        f"{layer}.lora_down.weight": torch.randn(4, 24, generator=generator),
    }


def lora(model):
    return comfy.sd.load_lora_for_models(model, None, lora_weights(), 1.0, 0.0)[0]


def windows(model):
    """Of two latents, which know nothing of each other in SD 1.5."""
    settings = (2, 0, "standard_static", 1, False, "flat", 0, False)
    return ContextWindowsManualNode.execute(model, *settings).args[0]


def softly_masked(latent):
    """From kept to new, from left to right."""
    return {"samples": latent["samples"], "noise_mask": torch.linspace(0, 1, 64).expand(1, 64, 64)}


DOWNSCALE = (2, 2.0, 0.0, 0.6, True, "bicubic", "bicubic")
ZSNR = ("v_prediction", True)
EDM = ("eps", 120.0, 0.002)
CONTINUOUS_V = ("v_prediction", 500.0, 0.03)
PATCHES = [
    Row("FreeU", of("freelunch", "FreeU", 1.1, 1.2, 0.9, 0.2)),
    Row("FreeU_V2", of("freelunch", "FreeU_V2", 1.3, 1.4, 0.9, 0.2)),
    Row("HyperTile", of("hypertile", "HyperTile", 32, 2, 0, False)),
    Row("TomePatchModel", of("tomesd", "TomePatchModel", 0.5)),
    Row("PatchModelAddDownscale", of("model_downscale", "PatchModelAddDownscale", *DOWNSCALE)),
    Row("SelfAttentionGuidance", of("sag", "SelfAttentionGuidance", 0.5, 2.0)),
    Row("PerturbedAttentionGuidance", of("pag", "PerturbedAttentionGuidance", 3.0)),
    Row("NAGuidance", of("nag", "NAGuidance", 5.0, 0.5, 1.5)),
    Row("RescaleCFG", of("model_advanced", "RescaleCFG", 0.7)),
    Row("APG", of("apg", "APG", 1.0, 5.0, 0.3)),
    Row("TCFG", of("tcfg", "TCFG")),
    Row("CFGZeroStar", of("cfg", "CFGZeroStar"), steps=1),
    Row("CFGNorm", of("cfg", "CFGNorm", 0.5)),
    Row("Mahiro", of("mahiro", "Mahiro")),
    Row("FreSca", of("fresca", "FreSca", 0.8, 1.25, 2)),
    Row("EpsilonScaling", of("eps", "EpsilonScaling", 1.05)),
    Row("TemporalScoreRescaling", of("eps", "TemporalScoreRescaling", 0.5, 3.0)),
    Row(
        "UNetSelfAttentionMultiply",
        of("attention_multiply", "UNetSelfAttentionMultiply", 1, 1, 2, 1),
    ),
    Row(
        "UNetCrossAttentionMultiply",
        of("attention_multiply", "UNetCrossAttentionMultiply", 1, 1, 2, 1),
    ),
    Row("ModelSamplingDiscrete", of("model_advanced", "ModelSamplingDiscrete", "lcm", False)),
    # Its noise is 4,500 times the picture, which costs the digits.
    Row(
        "ModelSamplingDiscrete, zsnr",
        of("model_advanced", "ModelSamplingDiscrete", *ZSNR),
        equal=2e-4,
    ),
    Row("ModelSamplingContinuousEDM", of("model_advanced", "ModelSamplingContinuousEDM", *EDM)),
    Row(
        "ModelSamplingContinuousV", of("model_advanced", "ModelSamplingContinuousV", *CONTINUOUS_V)
    ),
    Row("EasyCache", of("easycache", "EasyCacheNode", 5.0, 0.0, 1.0, False), steps=6),
    Row("LazyCache", of("easycache", "LazyCacheNode", 5.0, 0.0, 1.0, False), steps=6),
    Row(
        "DifferentialDiffusion",
        of("differential_diffusion", "DifferentialDiffusion"),
        latent=softly_masked,
        steps=4,
    ),
    Row("LoRA", lora),
    Row("image prompt, as IP-adapters", peer_patches.image_prompt),
    Row("reference keys, an attn1 patch", peer_patches.reference_keys),
    Row("self-attention replaced", peer_patches.replaced_self_attention),
    Row("more text, an attn2 patch", peer_patches.more_text),
    Row("scaled at our own place", peer_patches.scaled_middle, commutes=False),
    Row("U-Net function wrapper", peer_patches.unet_wrapper),
]


# Guiders ---------------------------------------------------------------------------------------


def as_cfg_of_scale_1(model, prompts):
    return cfg(model, prompts["positive"], prompts["negative"], 1.0)


def as_basic(model, prompts):
    return basic(model, prompts["positive"])


def as_dual(model, prompts):
    return dual(model, prompts["positive"], prompts["other"], prompts["negative"])


def as_nested_dual(model, prompts):
    conditions = [prompts[name] for name in ("positive", "other", "negative")]
    return dual(model, *conditions, style="nested")


def as_dual_model(model, prompts):
    conditions = (model, prompts["positive"], CFG, model, prompts["negative"])
    return stock.DualModelGuider.execute(*conditions).args[0]


def as_perpendicular(model, prompts):
    return perpendicular(model, prompts["positive"], prompts["negative"], prompts["empty"])


BOTH = ("positive", "other")
GUIDERS = [
    Row("CFGGuider"),
    Row("CFGGuider of scale 1", guide=as_cfg_of_scale_1),
    Row("BasicGuider", guide=as_basic),
    Row("DualCFGGuider, regular", guide=as_dual, looking=BOTH),
    Row("DualCFGGuider, nested", guide=as_nested_dual, looking=BOTH),
    Row("PerpNegGuider", guide=as_perpendicular),
]
if hasattr(stock, "DualModelGuider"):
    GUIDERS.append(Row("DualModelGuider", guide=as_dual_model))


# Samplers --------------------------------------------------------------------------------------

SAMPLERS = []
for name in (
    "euler",
    "euler_cfg_pp",
    "euler_ancestral",
    "heun",
    "dpm_2_ancestral",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_2m",
    "dpmpp_3m_sde",
    "ddim",
    "ddpm",
    "lcm",
    "ipndm",
    "deis",
    "res_multistep",
    "gradient_estimation",
    "er_sde",
    "seeds_2",
    "sa_solver",
    "uni_pc",
):
    # Four steps: of fewer, those that look between two steps make much of the last digit.
    SAMPLERS.append(Row(name, sampler=name, scheduler="karras", steps=4))
for name in ("sgm_uniform", "exponential", "ddim_uniform", "beta"):
    SAMPLERS.append(Row(f"dpmpp_2m, {name}", sampler="dpmpp_2m", scheduler=name, steps=3))


# Conditionings ---------------------------------------------------------------------------------


def in_area(conditioning):
    """For the whole, and once more for a corner."""
    corner = {"area": (4, 4, 2, 2), "strength": 1.0, "set_area_to_bounds": False}
    return [*conditioning, *symbols.with_values(conditioning, corner)]


def masked(conditioning):
    """Only for a part of the picture."""
    mask = torch.zeros(1, 64, 64)
    mask[:, :32, :32] = 1
    return ConditioningSetMask().append(conditioning, mask, "default", 1.0)[0]


def early(conditioning):
    return ConditioningSetTimestepRange().set_range(conditioning, 0.0, 0.6)[0]


def longer(conditioning):
    """Of twice as many tokens as the negative."""
    faint = [[text * 0.5, values] for text, values in conditioning]
    return ConditioningConcat().concat(conditioning, faint)[0]


def hooked(conditioning):
    """With a LoRA of its own."""
    hooks = comfy.hooks.create_hook_lora(lora_weights(), 1.0, 0.0)
    return ConditioningSetProperties().set_properties(conditioning, 1.0, "default", hooks=hooks)[0]


def controlled(control_net, image):
    """By a ControlNet."""

    def prompt(conditioning):
        node = ControlNetApplyAdvanced()
        return node.apply_controlnet(conditioning, [], control_net, image, 1.0, 0.0, 1.0)[0]

    return prompt


CONDITIONINGS = [
    Row("an area", prompt=in_area),
    Row("a mask", prompt=masked),
    Row("the first steps", prompt=early),
    Row("a longer text", prompt=longer),
    Row("a LoRA by hooks", prompt=hooked),
    Row("a ControlNet", prompt=controlled),
]


# Batches ---------------------------------------------------------------------------------------


def latents(count):
    def repeated(latent):
        return RepeatLatentBatch().repeat(latent, count)[0]

    return repeated


def last_two_of_four(latent):
    """By their numbers in the batch, which choose their noise."""
    return LatentFromBatch().frombatch(latents(4)(latent), 2, 2)[0]


def enlarged(latent):
    """To 10 by 6, of which neither is the visual prompt's 8."""
    return {"samples": torch.nn.functional.interpolate(latent["samples"], (10, 6))}


BATCHES = [
    Row("3 latents, 1 prompt", latent=latents(3)),
    Row("3 latents, 3 prompts", latent=latents(3), factors=(1.0, -2.0, 3.0)),
    Row("4 latents, 2 prompts", latent=latents(4), factors=(1.0, -2.0)),
    Row("2 latents, 4 prompts", latent=latents(2), factors=(1.0, -2.0, 3.0, -4.0)),
    Row(
        "4 latents in windows of 2",
        windows,
        latent=latents(4),
        factors=(1.0, -2.0, 3.0, -4.0),
        seen=False,
    ),
    Row("the last 2 of 4 latents", latent=last_two_of_four, factors=(1.0, -2.0)),
    Row("a noise mask", latent=softly_masked),
    Row("10 by 6 latents", latent=enlarged),
]


TABLE = {
    "patch": PATCHES,
    "guider": GUIDERS,
    "sampler": SAMPLERS,
    "conditioning": CONDITIONINGS,
    "batch": BATCHES,
}
