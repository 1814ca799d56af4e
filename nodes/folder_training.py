"""A small training run inside ComfyUI, from a folder of examples to a file of the trained part."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from comfy_api.latest import io, ui
from torch import nn

from ..cat_core import weights
from ..cat_core.config import Architecture, RefAdapterConfig, SemInpainterConfig
from ..cat_core.data.folder import DataFolder, triples
from ..cat_core.data.manifest import Record, read
from ..cat_core.data.masks import VARIANTS
from ..cat_core.data.tally import Tally
from ..cat_core.files import remove_leftovers
from ..cat_core.pictures import plots
from ..cat_core.pictures.tensors import channels_last
from ..cat_core.training import checkpoints, loop, start
from ..cat_core.training.batches import Batches
from ..cat_core.training.settings import Settings, TrainingRun
from ..cat_core.training.stages import Stage
from ..cat_core.training.stores import FreshSamples, KeptSamples
from ..cat_core.weights import trained_stages
from .host import memory, messages, model_files
from .host.build import build_cat_model
from .host.cat_model import CatModel, part_tensors
from .host.encoders import HostEncoders

EXPECTED = (
    "Expected for each example a picture and a mask (white = object): either "
    "fire_hydrant_image.png and fire_hydrant_mask.png, or NAME.jpg, NAME_mask.png and the object's "
    "name in NAME.txt; or a manifest.jsonl of tools/prepare_data.py."
)
NAMED = 5  # examples that a sentence about the unusable ones names for each reason
SECONDS_A_PREVIEW = 1

Config = SemInpainterConfig | RefAdapterConfig
Build = Callable[[], tuple[nn.Module, dict[str, nn.Module]]]  # -> objective, modules


class FolderTraining:
    """The folder's examples, encoded once into memory; the loop; the file of the trained part.

    Args:
        stage: trains one part.
        rate: its learning rate.
        folder: in the host's input folder.
        cat_model: to go on from, or None.
    """

    def __init__(
        self,
        stage: Stage,
        settings: Settings,
        *,
        rate: float,
        folder: str,
        filename_prefix: str,
        licence: str,
        cat_model: CatModel | None,
    ):
        # What would fail after the run is refused before it.
        loop.require_accelerate()
        loop.check_batch_size(settings)
        (self.part,) = stage.parts
        self.stage = replace(stage, rates=((self.part, rate),))
        self.settings = settings
        self.folder = folder
        self.filename_prefix = filename_prefix
        self.licence = licence
        self.cat_model = cat_model
        self.saved = ""  # a sentence that says where the weights are
        self.tensors = part_tensors(cat_model, self.part, torch.float32)
        self._try_to_save()
        self.path, _ = model_files.input_folder(folder)
        self.records, self.tally = examples(self.path)
        holes = len(VARIANTS) * len(self.records)
        self.bar = messages.progress_bar(holes + settings.steps)

    def encode(self, encoders: HostEncoders, size: int = 512, cell: int = 8) -> Batches:
        """Run the frozen networks over all examples.

        Raises ValueError where none can be used; it names them.
        """
        fresh = FreshSamples(
            self.records,
            self.path,
            encoders,
            objective=self.stage.objective,
            reads=self.stage.reads,
            size=size,
            cell=cell,
            tally=self.tally,
        )
        store = KeptSamples(fresh)
        usable = 0
        for index in range(len(store)):
            for variant in VARIANTS:
                memory.raise_if_cancelled()
                usable += store.sample(index, variant) is not None
                self.bar.update(1)
        if not usable:
            raise ValueError(
                f"There is nothing to train on in {self.path}. "
                f"{self.skipped() or 'No example was found.'} {EXPECTED}"
            )
        empty_context = encoders.context([""]) if self.stage.diffusion else None
        return Batches(store, self.settings.batch_size, self.settings.seed, empty_context)

    def skipped(self) -> str:
        """A sentence about the examples that cannot be used, or nothing."""
        reasons = []
        for reason, count in self.tally.skipped.items():
            names = ", ".join(self.tally.examples[reason][:NAMED])
            more = " ..." if count > NAMED else ""
            reasons.append(f"{reason}: {names}{more}")
        if not reasons:
            return ""
        return f"Skipped {sum(self.tally.skipped.values())} examples ({'; '.join(reasons)})."

    def trainable(self, config: Config) -> dict[str, nn.Module]:
        """The part that is trained, in fp32, and nothing else."""
        alone = replace(Architecture(), **{self.part: config})
        parts = {self.part: self.tensors} if self.tensors else {}
        return start.trainable_parts(alone, parts, self.settings.seed)

    def train(self, batches: Batches, build: Build, config: Config) -> io.NodeOutput:
        """Train what `build` makes; the host's own models are not touched.

        `build` is called where tensors can have gradients; `config` describes the trained part.
        """
        known = self.cat_model.architecture if self.cat_model else Architecture()
        architecture = replace(known, **{self.part: config})
        progress = _Progress(self.bar, self.settings.steps)
        memory.clear_memory()
        path = self._trained(batches, build, architecture, progress)
        memory.clear_memory()
        messages.say(
            messages.sentence("{saved} {skipped}", saved=self.saved, skipped=self.skipped())
        )
        image = channels_last([progress.plot()])
        cat_model = build_cat_model(model_files.read_path(path))
        return io.NodeOutput(cat_model, image, ui=ui.PreviewImage(image))

    def _trained(
        self, batches: Batches, build: Build, architecture: Architecture, progress: "_Progress"
    ) -> Path:
        """Run the loop and save what it learned, after Cancel too; returns the file."""

        def source(step, positions):
            memory.raise_if_cancelled()
            return batches(step, positions)

        # The host runs nodes in inference mode, in which nothing can be trained:
        # execution.py:751 (inference_mode).
        with torch.inference_mode(False), torch.enable_grad(), own_accelerate():
            objective, modules = build()
            data = {"manifests": [self.folder], "records": len(self.records), "split": "train"}
            run = TrainingRun(self.stage, modules, objective, self.settings, data=data)
            try:
                loop.train(run, source, cpu=memory.on_cpu(), on_step=progress.on_step)
            except memory.Cancelled:
                done = len(progress.history)
                if done:
                    self._save(run, architecture, done)
                    messages.say(
                        messages.sentence(
                            "Cancelled after {done} of {steps} steps. {saved} "
                            "Connect these weights to cat_model to go on.",
                            done=done,
                            steps=self.settings.steps,
                            saved=self.saved,
                        )
                    )
                raise
            return self._save(run, architecture, len(progress.history))

    def _save(self, run: TrainingRun, architecture: Architecture, steps: int) -> Path:
        """Write the trained part, and beside it the other one that came in, under a new name."""
        parts = {}
        for part in ("sem_inpainter", "ref_adapter"):
            tensors = part_tensors(self.cat_model, part)
            if tensors:
                parts[part] = tensors
        parts[self.part] = run.modules[self.part].state_dict()
        header = weights.cat_metadata(
            parts, architecture, licence=self.licence, provenance=self._provenance(steps)
        )
        earlier = self.cat_model.trained if self.cat_model else ()
        stages = [*earlier, checkpoints.trained_stage(run, steps)]
        header |= trained_stages.header(trained_stages.of_parts(stages, parts))
        tensors = weights.flat(parts)
        try:
            path = Path(model_files.new_path(self.filename_prefix))
            weights.save(path, tensors, header)
            self.saved = f"Saved as {path.name}."
        except (ValueError, OSError, weights.WeightsError) as error:
            # Nothing but a full disk can be in the way there.
            path = Path(tempfile.mkdtemp(prefix="cat_weights_"), "trained.safetensors")
            weights.save(path, tensors, header)
            self.saved = (
                f"The weights could not be saved in their place ({error}). They are in {path}: "
                "move them to models/cat_diffusion, as that folder is emptied some day."
            )
        return path

    def _try_to_save(self) -> None:
        """Make the result's file and remove it again.

        A name or licence that cannot be written would be found at the end only. Raises ValueError.
        """
        try:
            self.licence.encode()
            self.filename_prefix.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"filename_prefix {self.filename_prefix!r} or licence {self.licence!r} holds half "
                "a character, which no file can hold. Type it again."
            ) from error
        if "\0" in self.filename_prefix:
            raise ValueError(
                f"filename_prefix is {self.filename_prefix!r}, which holds a zero character; "
                "expected the beginning of a file's name, such as my_cat."
            )
        path = Path(model_files.new_path(self.filename_prefix))
        remove_leftovers(path.parent, path.name.rsplit("_", 2)[0])
        header = {"license": self.licence, "provenance": self._provenance(self.settings.steps)}
        try:
            weights.save(path, {"probe": torch.zeros(1)}, header)
            path.unlink()
        except (OSError, weights.WeightsError) as error:
            raise ValueError(
                f"The weights cannot be saved as {path} ({error}). Give another, shorter "
                "filename_prefix, or check the folder's permissions."
            ) from error

    def _provenance(self, steps: int) -> str:
        """What the file's header says of its origin."""
        origin = f", from {self.cat_model.name}" if self.cat_model else ""
        text = (
            f"trained in ComfyUI on folder {self.folder}{origin}; "
            f"stage {self.stage.name}, {steps} steps"
        )
        # A folder's name may hold bytes that are no text.
        return text.encode("utf-8", "replace").decode()


class _Progress:
    """The bar on the node, with the loss of each step plotted once a second."""

    def __init__(self, bar, steps: int):
        self.bar = bar
        self.steps = steps
        self.history: list[Mapping[str, float]] = []  # each step's figures
        self.shown = time.monotonic()

    def plot(self):
        """The picture of all steps so far."""
        return plots.curves(self.history, self.steps)

    def on_step(self, step: int, figures: Mapping[str, float]) -> None:
        """Show a step; raises where the user has pressed Cancel."""
        self.history.append(figures)
        preview = None
        is_due = time.monotonic() - self.shown > SECONDS_A_PREVIEW
        if is_due or step == self.steps:  # the last preview is the result's
            preview = ("PNG", self.plot(), None)
            self.shown = time.monotonic()
        encoded = self.bar.total - self.steps
        self.bar.update_absolute(encoded + step, preview=preview)
        memory.raise_if_cancelled()


def examples(path: Path) -> tuple[list[Record], Tally]:
    """The records of a folder's manifest, or of its triples; the tally counts what is none."""
    tally = Tally()
    if (path / "manifest.jsonl").exists():
        return read(path / "manifest.jsonl", "train"), tally
    records = []
    for candidate in triples(DataFolder(path, ""), "train"):
        if candidate.record is None:
            tally.skip(candidate.reason, candidate.id)
        else:
            records.append(candidate.record)
    return records, tally


@contextmanager
def own_accelerate() -> Iterator[None]:
    """Give a run a state of Accelerate's own, and put the other one back.

    Accelerate keeps one state a process, fixed by whoever comes first.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    copies = [dict(state) for state in states]
    try:
        for state in states:
            state.clear()
        yield
    finally:
        for state, copy in zip(states, copies, strict=True):
            state.clear()
            state.update(copy)
