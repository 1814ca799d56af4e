"""Around a sampling: the guider and its conditions, and tensors that travel with them to patches.

What the host does to the rows of a batch, it does to every tensor of their condition: it repeats
them, puts them under each other, and slices them into context windows.
"""

from collections.abc import Callable

import comfy.conds
import comfy.patcher_extension
import torch


def wrap_sampling(model, key: str, outer_sample: Callable, apply_model: Callable) -> None:
    """Let a MODEL's samplings go through outer_sample, its U-Net through apply_model, once a key.

    comfy/model_patcher.py:1335 (add_wrapper_with_key), comfy/patcher_extension.py:51 (OUTER_SAMPLE)
    and comfy/patcher_extension.py:56 (APPLY_MODEL). Without them nothing tells which rows of a
    batch are conditional under other guiders than CFG, nor which latents of a context window.

    Args:
        outer_sample: outer_sample(executor, noise, ...), which returns executor(noise, ...).
        apply_model: what carry_to_patches gives.
    """
    kinds = comfy.patcher_extension.WrappersMP
    for kind, wrapper in ((kinds.OUTER_SAMPLE, outer_sample), (kinds.APPLY_MODEL, apply_model)):
        if not model.get_wrappers(kind, key):
            model.add_wrapper_with_key(kind, key, wrapper)


def guider_of(executor):
    """The guider of a sampling, from what wraps it.

    comfy/samplers.py:1329 (outer_sample). See wrap_sampling.
    """
    return executor.class_obj


def conditions_of(guider) -> dict[str, list[dict]]:
    """The conditions of a sampling that starts, in lists by the guider's names for them.

    They are copies, made for the one sampling: comfy/samplers.py:1316 (original_conds). See
    wrap_sampling.
    """
    return guider.conds


def sampled_model(guider):
    """The MODEL that a guider samples with, with all that nodes after ours changed.

    comfy/samplers.py:1190 (model_patcher). Without it start_percent and end_percent depend on the
    order of nodes.
    """
    return guider.model_patcher


def tell_patches(guider, name: str, value) -> None:
    """Let all patches of one sampling find a value in their options.

    comfy/samplers.py:1321 (create_model_options_clone): the options are a copy, made for the one
    sampling. See wrap_sampling.
    """
    guider.model_options.setdefault("transformer_options", {})[name] = value


def let_travel(condition: dict, name: str, tensor: torch.Tensor) -> None:
    """Let a tensor (B, ...) go with the rows of a condition; see carry_to_patches.

    comfy/conds.py:26 (CONDRegular) and comfy/samplers.py:97 (model_conds). A text is such a tensor,
    so that whoever calls the U-Net with other rows has to treat it the same way. It stays where it
    is: on the CPU no step waits for it. See wrap_sampling.
    """
    travelling = {name: comfy.conds.CONDRegular(tensor)}
    condition["model_conds"] = {**condition["model_conds"], **travelling}


def carry_to_patches(name: str, read: Callable) -> Callable:
    """A wrapper of the U-Net that puts what travels under a name into the options of its patches.

    comfy/model_base.py:200 (kwargs): what else travels than texts, masked latents and ControlNet
    comes as arguments by name. See wrap_sampling.

    Args:
        read: read(tensor), what the patches find there.
    """

    def apply_model(
        executor,
        x,
        t,
        c_concat=None,
        c_crossattn=None,
        control=None,
        transformer_options=None,
        **travelling,
    ):
        options = dict(transformer_options or {})
        if name in travelling:
            options[name] = read(travelling.pop(name))
        return executor(x, t, c_concat, c_crossattn, control, options, **travelling)

    return apply_model


def condition_id(condition: dict):
    """What chunks_of_batch calls a condition.

    comfy/sampler_helpers.py:67 (uuid). Without it prompts that another node makes during the
    sampling look at the visual prompt.
    """
    return condition["uuid"]


def condition_text(condition: dict) -> torch.Tensor | None:
    """The encoded text of a condition; the same object as in the CONDITIONING it was made of.

    comfy/sampler_helpers.py:65 (cross_attn). Without it a guider's prompt that is neither called
    positive nor negative counts as positive.
    """
    return condition.get("cross_attn")
