"""Weight files: their keys, what is read from them, and how they are written."""

from .checkpoint import (
    CAT_PARTS,
    Checkpoint,
    WeightsError,
    cat_module,
    cat_modules,
    check_keys,
    merge,
    split,
)
from .keys import DTYPES, PREFIXES, TITLES, describe, flat, sort_keys
from .reading import load_safetensors, parts_inside, read
from .writing import FORMAT, FORMAT_VERSION, cat_metadata, header, save, write_cat_weights

__all__ = [
    "CAT_PARTS",
    "DTYPES",
    "FORMAT",
    "FORMAT_VERSION",
    "PREFIXES",
    "TITLES",
    "Checkpoint",
    "WeightsError",
    "cat_metadata",
    "cat_module",
    "cat_modules",
    "check_keys",
    "describe",
    "flat",
    "header",
    "load_safetensors",
    "merge",
    "parts_inside",
    "read",
    "save",
    "sort_keys",
    "split",
    "write_cat_weights",
]
