"""What recipe and ablation share: files of weights, and a stage as tools/train.py runs it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from cat_diffusion.cat_core import weights
from cat_diffusion.cat_core.config import Architecture, Tensors
from cat_diffusion.cat_core.knowledge import Knowledge
from cat_diffusion.cat_core.training.settings import Settings
from cat_diffusion.cat_core.training.stages import Stage
from demo_model import networks
from training import stage_run

LICENCE = "MIT"
PROVENANCE = "demo model, tools/demo_model/recipe.py, procedural scenes"


def newest(folder: Path) -> Path:
    """The latest weights of a stage; of one that has none, where they would be."""
    return max(folder.glob("checkpoint-*[0-9]"), default=folder) / "weights.safetensors"


def fresh_networks(work: Path) -> Path:
    """A file with all networks, not trained, written once."""
    path = work / "start.safetensors"
    if not path.exists():
        modules = networks.networks(torch.Generator().manual_seed(0))
        write_parts(
            path,
            {part: module.state_dict() for part, module in modules.items()},
            networks.architecture(modules["unet"]),
            provenance=f"{PROVENANCE}, not trained",
        )
    return path


def write_parts(
    path: Path,
    parts: Mapping[str, Tensors],
    architecture: Architecture,
    *,
    provenance: str,
    knowledge: Knowledge | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """A file of parts, of CAT-Diffusion's own or others; see weights.save."""
    metadata = weights.header(parts, architecture, licence=LICENCE, provenance=provenance)
    if knowledge:
        metadata.update(knowledge.header())
    weights.save(path, weights.flat(parts), metadata, dtype, overwrite)


def train_stage(
    stage: Stage,
    folder: Path,
    *,
    base: Sequence[Path],
    work: Path,
    steps: int,
    batch_size: int,
    final_rate: float,
    cpu: bool,
) -> None:
    """A stage of tools/train.py on the scenes and the cache in `work`.

    Args:
        stage: may have other rates than the table's.
        folder: for checkpoints and log.
        base: files that it starts from.
        final_rate: what is left of the rates at the end.
    """
    settings = Settings(
        steps=steps,
        batch_size=batch_size,
        micro_batch_size=batch_size,
        warmup=50,
        final_rate=final_rate,
        save_every=200,
    )
    described = stage_run.StageRun(
        stage=stage,
        base=base,
        data=work / "scenes/manifest.jsonl",
        folder=folder,
        settings=settings,
        cache=work / "cache",
        size=networks.SIZE,
        licence=LICENCE,
        cpu=cpu,
    )
    stage_run.run(described)
