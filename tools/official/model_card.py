"""A model card beside a weights file: data, steps, stages, licence, metrics, as its header says."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from cat_diffusion.cat_core import weights
from cat_diffusion.cat_core.files import write_text
from cat_diffusion.cat_core.weights import trained_stages
from cat_diffusion.cat_core.weights.trained_stages import TrainedStage

UNSAID = "not said"
BYTES_AT_ONCE = 1 << 20


def path_of(file: Path) -> Path:
    """Where a file's card lies: model.safetensors -> model.md."""
    return file.with_suffix(".md")


def write(file: Path, parts: list[str], metadata: Mapping[str, str]) -> None:
    """Write a file's card.

    Args:
        parts: that the file holds.
        metadata: its header.
    Raises:
        WeightsError: nothing can be written there.
    """
    try:
        write_text(path_of(file), "\n".join(_lines(file, parts, metadata)) + "\n")
    except OSError as error:
        raise weights.WeightsError(
            f"Cannot write {path_of(file)}: {error}. Check free space and permissions; "
            f"{file.name} is whole."
        ) from error


def _lines(file: Path, parts: list[str], metadata: Mapping[str, str]) -> Iterator[str]:
    licence = metadata.get("license") or "unknown"
    # What model hubs read: https://huggingface.co/docs/hub/model-cards
    yield from ("---", f"license: {_quoted(licence)}", "tags:")
    yield from (f"- {tag}" for tag in ("cat-diffusion", "inpainting", "stable-diffusion"))
    yield from ("---", "", f"# {file.stem}", "")
    yield f"{_titles(parts)} for [CAT-Diffusion](https://arxiv.org/abs/2409.08260)."
    yield ""
    yield "| | |"
    yield "|---|---|"
    yield f"| File | `{file.name}`, {file.stat().st_size:,} bytes |"
    yield f"| SHA-256 | `{_digest(file)}` |"
    yield f"| Licence | {_cell(licence)} |"
    yield f"| Origin | {_cell(metadata.get('provenance', UNSAID))} |"
    yield from ("", "## Training", "")
    stages = trained_stages.of_parts(trained_stages.of_header(metadata), parts)
    if not stages:
        yield "The header of the file does not say how it was trained."
    for number, stage in enumerate(stages, 1):
        yield f"{number}. **{_cell(stage.get('stage', UNSAID))}**"
        for name, value in _facts(stage):
            yield f"   - {name}: {_cell(value)}"
    yield from ("", "## To be written by whoever shares it", "")
    yield "- What it is for, and what it does badly: names, sizes, kinds of pictures."
    yield "- Metrics on a test set (`tools/evaluate.py`), with the command that measured them."


def _facts(stage: TrainedStage) -> Iterator[tuple[str, object]]:
    """A stage's lines, as far as its header tells."""
    yield "trained", _titles(stage.get("parts", []))
    samples = ""
    if isinstance(stage.get("samples"), int):
        samples = f", {stage['samples']:,} samples"
    yield "steps", f"{stage.get('steps', UNSAID)} of {stage.get('batch_size', UNSAID)}{samples}"
    data = stage.get("data")
    if not isinstance(data, dict):
        data = {}
    names = _listed(data.get("manifests"))
    yield "data", f"{names}, {data.get('records', UNSAID)} records of split {data.get('split', '')}"
    yield "licence of the data", data.get("licence", UNSAID)
    yield "started from", _listed(data.get("base"))
    yield "pictures", f"{data.get('pictures', UNSAID)}, {data.get('size', UNSAID)} pixels"
    yield "learning rates", _pairs(stage.get("rates"))
    yield "precision", stage.get("precision", UNSAID)
    if stage.get("moving_average"):
        yield "moving average", stage["moving_average"]
    validation = stage.get("validation")
    if isinstance(validation, dict):
        yield "held-out records", _pairs(validation)
    else:
        yield "held-out records", "not measured"


def _titles(parts) -> str:
    return weights.describe(map(str, parts)) if isinstance(parts, list) else UNSAID


def _listed(names) -> str:
    return ", ".join(map(str, names)) if isinstance(names, list) and names else UNSAID


def _pairs(values) -> str:
    """name value, name value."""
    if not isinstance(values, dict) or not values:
        return UNSAID
    texts = []
    for name, value in values.items():
        texts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(texts)


def _cell(value: object) -> str:
    """A text within a line of Markdown."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _quoted(text: str) -> str:
    """A text as YAML takes any."""
    return '"' + " ".join(text.split()).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while chunk := content.read(BYTES_AT_ONCE):
            digest.update(chunk)
    return digest.hexdigest()
