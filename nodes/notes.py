"""Sentences that more than one node says: what is odd, though it can be done."""

import torch

from ..cat_core.knowledge import Knowledge
from .checks import shown
from .host.messages import Sentence, sentence


def about_empty(holes: torch.Tensor) -> list[Sentence]:
    """Which of the holes (B, ...), where not 0, are none."""
    empty = int((~holes.flatten(1).bool().any(1)).sum())
    if empty == len(holes):
        return [sentence("The mask is empty. Paint it white where the object goes.")]
    if empty:
        return [
            sentence("The mask of {empty} of {all} pictures is empty.", empty=empty, all=len(holes))
        ]
    return []


def about_cells(patch_mask: torch.Tensor) -> list[Sentence]:
    """What is odd about the hidden cells (B, 1, G, G)."""
    if patch_mask.all():
        return [sentence("The mask covers everything: the visual prompt rests on the text alone.")]
    return about_empty(patch_mask)


def about_name(knowledge: Knowledge, label: str) -> list[Sentence]:
    """Which names a model knows in place of one that it does not."""
    nearest = knowledge.nearest_to(label)
    if not nearest:
        return []
    return [
        sentence(
            "This model does not know {label}. Nearest: {nearest}.",
            label=shown(label),
            nearest=", ".join(nearest),
        )
    ]


def about_length(left_out: int) -> list[Sentence]:
    """What CLIP does not read of a text.

    Args:
        left_out: how many of its tokens.
    """
    if not left_out:
        return []
    return [
        sentence(
            "CLIP reads 75 words and signs of a text: {left_out} at the end of this one are left "
            "out. Type the object's name alone.",
            left_out=left_out,
        )
    ]
