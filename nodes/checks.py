"""What reaches a node although the canvas does not let it: by the API and from other packs' nodes.

The host looks at constants alone, and lets null and NaN pass: execution.py:1020 (min).
"""

import numbers
from typing import Any

import numpy as np
import torch

# By the name of an input: what its value can do, what it is called, and where one comes from.
WIRES = {
    "model": (("clone", "model_options"), "a MODEL", "CAT Load Checkpoint"),
    "clip": (("tokenize", "encode_from_tokens"), "a CLIP", "CAT Load Checkpoint"),
    "vae": (("encode", "decode"), "a VAE", "CAT Load Checkpoint"),
    "clip_vision": (("encode_image",), "a CLIP_VISION", "CAT Load Checkpoint"),
    "cat_model": (("architecture", "sem_inpainter"), "a CAT_MODEL", "CAT Load Weights"),
    "mask": (("shape",), "a MASK", "Load Image"),
    "visual_prompt": (("tokens", "patch_mask"), "a VISUAL_PROMPT", "CAT Semantic Inpaint"),
    "previous": (("tokens", "patch_mask"), "a VISUAL_PROMPT", "CAT Semantic Inpaint"),
    "crop": (("photo", "squares"), "a CAT_CROP", "CAT Crop Around Mask"),
}
LONGEST = 60  # letters of a value that a sentence repeats


def check_wires(**values: Any) -> None:
    """Raise ValueError where a wire, by the name of its input, carries something else."""
    for name, value in values.items():
        abilities, kind, source = WIRES[name]
        if not all(hasattr(value, ability) for ability in abilities):
            raise ValueError(
                f"{name} is {shown(value)}; expected {kind}. "
                f"Connect one, for example from {source}."
            )


def check_conditioning(**values: Any) -> None:
    """Raise ValueError where a wire carries no CONDITIONING: a list of [tensor, values]."""
    for name, value in values.items():
        if not _is_conditioning(value):
            raise ValueError(
                f"{name} is {shown(value)}; expected a CONDITIONING. "
                "Connect one, for example from CLIP Text Encode."
            )


def _is_conditioning(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    for entry in value:
        if not isinstance(entry, (list, tuple)) or len(entry) < 2:
            return False
        if not isinstance(entry[0], torch.Tensor) or not isinstance(entry[1], dict):
            return False
    return True


def check_number(name: str, value: Any, least: float, most: float, *, whole: bool = False) -> None:
    """Raise ValueError unless it is a number in [least, most]; NaN is none."""
    is_number = isinstance(value, numbers.Integral if whole else numbers.Real)
    if not is_number or not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        raise ValueError(
            f"{name} is {shown(value)}; expected {kind} from {least} to {most}. Type one of these."
        )


def check_choice(name: str, value: Any, choices: list[str]) -> None:
    """Raise ValueError unless it is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{name} is {shown(value)}; expected one of {', '.join(choices)}. Choose one."
        )


def check_switch(name: str, value: Any) -> None:
    """Raise ValueError unless it is true or false."""
    if not isinstance(value, (numbers.Integral, np.bool_)):
        raise ValueError(f"{name} is {shown(value)}; expected true or false. Choose one.")


def object_name(text: Any) -> str:
    """The object's name that a user typed, without the spaces around it.

    Raises ValueError if it is none, or nothing that can be read.
    """
    if not isinstance(text, str):
        raise ValueError(f"The text is {shown(text)}; expected the object's name. Type it.")
    if is_broken(text):
        raise ValueError(
            f"The text {shown(text)} holds half a character, which cannot be read. "
            "Type the name of the object again."
        )
    label = text.strip()
    if not label:
        found = "The text is empty: it has only spaces." if text else "The text is empty."
        raise ValueError(f"{found} Type the name of the object that belongs in the hole.")
    return label


def odd_name(name: str, value: Any) -> str | None:
    """A sentence about what can be no file's name, or None."""
    if not isinstance(value, str):
        return f"{name} is {shown(value)}; expected the name of a file. Choose one from the list."
    if is_broken(value) or "\0" in value:
        return (
            f"{name} is {shown(value)}: this name holds what is no character. "
            "Rename the file, and choose it from the list."
        )
    return None


def check_name(name: str, value: Any) -> None:
    """Raise ValueError unless it can be a file's name."""
    sentence = odd_name(name, value)
    if sentence:
        raise ValueError(sentence)


def is_broken(text: str) -> bool:
    """Whether a text holds a lone surrogate, at which writing it fails, in the host's log too."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def shown(value: Any) -> str:
    """A value as a sentence repeats it: what is long is cut, what cannot be read is escaped."""
    if value is None:
        return "missing"
    if not isinstance(value, (str, numbers.Number)):
        return f"of type {type(value).__name__}"
    text = ascii(value) if isinstance(value, str) and is_broken(value) else repr(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."
