"""The ablation's rows, budgets and test set, and where what they make is kept."""

from dataclasses import dataclass
from pathlib import Path

from cat_diffusion.cat_core import weights
from cat_diffusion.cat_core.evaluation.results import SampleSet
from comfyui import ROOT
from demo_model import networks, scenes
from demo_model.demo_stages import fresh_networks, newest, write_parts

DEMO_MODEL = ROOT / "models/cat_demo_model.safetensors"
SCENES = 6_000
BATCH = 32
TEST_HOLES = 500  # of each kind
HOLES = ("box", "segment")
SEEDS = (0, 1, 2)
FROZEN_PARTS = ("clip_text", "clip_vision", "vae")


@dataclass(frozen=True)
class Phase:
    """A part of the budget that all rows have in common."""

    steps: int
    rate: float
    final_rate: float  # what is left of the rate at the end


# Every row's U-Net goes through the same steps at the same rates: shared ones first, then two
# phases of its own.
SHARED_PHASE = Phase(steps=500, rate=1e-3, final_rate=1.0)
OWN_PHASES = (
    Phase(steps=800, rate=1e-3, final_rate=0.3),
    Phase(steps=500, rate=3e-4, final_rate=0.05),
)
# SemInpainter's own training stands beside the rows' budget, as in the paper.
SEM_INPAINTER_PHASE = Phase(steps=1200, rate=1e-3, final_rate=0.02)
CASCADE_RATE = 5e-5


@dataclass(frozen=True)
class AblationRow:
    """A row of the table."""

    number: int  # from 1
    name: str
    stages: tuple[str, str]  # of each of its phases

    @property
    def has_sem_inpainter(self) -> bool:
        """Whether SemInpainter predicts its visual prompt."""
        return "cascade" in self.stages


INPAINTING = AblationRow(1, "inpainting", ("unet", "unet"))
WITH_REF_ADAPTER = AblationRow(2, "+ RefAdapter", ("ref-adapter-observed", "ref-adapter-observed"))
WITH_SEM_INPAINTER = AblationRow(3, "+ SemInpainter", ("ref-adapter-unet", "cascade"))
ROWS = (INPAINTING, WITH_REF_ADAPTER, WITH_SEM_INPAINTER)


def phase_folder(row: AblationRow, phase: int, work: Path) -> Path:
    """Where a row's first or second phase keeps its weights."""
    return work / f"row{row.number}-{'ab'[phase]}"


def frozen(work: Path) -> Path:
    """The demo model's CLIP and VAE in a file of their own, written once."""
    path = work / "frozen.safetensors"
    if not path.exists():
        file = weights.read(DEMO_MODEL)
        write_parts(
            path,
            {part: file.parts[part] for part in FROZEN_PARTS},
            file.architecture,
            provenance="the demo model's CLIP and VAE",
        )
    return path


def checkpoint(row: AblationRow, work: Path) -> Path:
    """A row's file for CAT Load Checkpoint, written once.

    The first two rows' SemInpainter is not trained, and nobody asks it.
    """
    path = work / f"row{row.number}.safetensors"
    if not path.exists():
        paths = [fresh_networks(work), frozen(work)]
        if row.has_sem_inpainter:
            paths.append(newest(work / "sem-inpainter"))
        paths.append(newest(phase_folder(row, 1, work)))
        file = weights.merge([weights.read(path) for path in paths])
        write_parts(
            path,
            file.parts,
            file.architecture,
            provenance=f"ablation, row {row.number}: {row.name}",
        )
    return path


def test_manifest(work: Path, shorter: int) -> Path:
    """The test scenes, written once."""
    manifest = work / "test/manifest.jsonl"
    if not manifest.exists():
        scenes.write(manifest.parent, scenes.TEST[: TEST_HOLES // shorter])
    return manifest


def test_set(manifest: Path, hole: str) -> SampleSet:
    """The test scenes with one kind of hole."""
    return SampleSet(manifest, "test", hole, networks.SIZE).read()


def results_folder(work: Path, row: AblationRow, hole: str, seed: int) -> Path:
    """Where a row's pictures are."""
    return work / "results" / f"row{row.number}-{hole}-seed{seed}"
