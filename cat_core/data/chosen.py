"""What is written beside the manifest of a chosen test set: how it was chosen, and its hash."""

import hashlib
import json
from pathlib import Path

FORMAT = "cat-diffusion test set 1"


def record_path(manifest: Path) -> Path:
    """The file beside a manifest."""
    return manifest.with_name(f"{manifest.name}.testset.json")


def told(manifest: Path) -> str | None:
    """How a report quotes a test set, or None where the manifest is not of one.

    A manifest that was changed afterwards is quoted as that.
    """
    try:
        about = json.loads(record_path(manifest).read_text("utf-8"))
        content = manifest.read_bytes()
        quoted = f"{about['sha256'][:16]}, {about['count']:,} samples"
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if hashlib.sha256(content).hexdigest() != about.get("manifest_sha256"):
        return f"was {quoted}, but the manifest was changed afterwards"
    return quoted
