"""Small training runs inside ComfyUI, on a folder of examples; tools/train.py is for long ones, with the same loop."""

import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..cat_core import weights
from ..cat_core.config import Architecture
from ..cat_core.data import manifest, masks, tally
from ..cat_core.data.folder import Folder, triples
from ..cat_core.pictures import plots
from ..cat_core.training import loop, samples, start
from ..cat_core.training.objectives import Diffusion, Distillation, stable_diffusion_schedule
from ..cat_core.training.stages import STAGES
from .host import memory, messages, model_files
from .host.build import build_cat_model
from .host.cat_model import CatModel, part_tensors
from .host.clip import check_clip_vision, clip_vision_sizes, encode_text
from .host.denoiser import Denoiser, trainable_unet, unet_of
from .host.encoders import HostEncoders
from .host.unet import check_context, check_trainable, check_unet, unet_heads, vae_cell
from .visual_prompt import CLIP_VISION_TOOLTIP
from .wires import CATEGORY, CatModelWire

EXPECTED = (
    "Expected for each example a picture and a mask (white = object): either fire_hydrant_image.png and "
    "fire_hydrant_mask.png, or NAME.jpg, NAME_mask.png and the object's name in NAME.txt; or a manifest.jsonl of "
    "tools/prepare_data.py."
)
PRECISIONS = {"fp32": "no", "bf16": "bf16"}


def _settings_inputs(prefix: str) -> list:
    """What both nodes ask for at the end."""
    return [
        io.Combo.Input(
            "precision",
            options=list(PRECISIONS),
            default="fp32",
            tooltip="bf16 is faster and takes less memory on recent GPUs. The weights are fp32 in any case.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**63 - 1,
            control_after_generate=False,
            tooltip="Fixes the new weights, the order of the examples and the noise.",
        ),
        io.String.Input(
            "filename_prefix",
            default=prefix,
            tooltip="Beginning of the file's name in models/cat_diffusion. A number follows; nothing is "
            "overwritten.",
        ),
        io.String.Input(
            "licence",
            default="unknown",
            tooltip="Licence of the trained weights, for the file's header.",
        ),
    ]


def _outputs() -> list:
    return [
        CatModelWire.Output(
            display_name="CAT_MODEL",
            tooltip="The trained part, and what else came in by cat_model.",
        ),
        io.Image.Output(display_name="loss_plot", tooltip="The loss of each step."),
    ]


def _folder_input():
    return io.Combo.Input(
        "folder",
        options=model_files.input_folders(),
        tooltip="A folder in ComfyUI's input folder. " + EXPECTED,
    )


class CATTrainSemInpainter(io.ComfyNode):
    """Stage 1: SemInpainter learns to predict CLIP's features of the whole picture."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CATTrainSemInpainter",
            display_name="CAT Train SemInpainter",
            category=f"{CATEGORY}/training",
            search_aliases=["finetune", "train stage 1", "distillation", "训练"],
            description="Train a SemInpainter on a folder of examples, anew or from a CAT model. Cancel keeps what was "
            "learned so far.",
            is_output_node=True,
            inputs=[
                io.ClipVision.Input(
                    "clip_vision", tooltip=CLIP_VISION_TOOLTIP + " It is the teacher."
                ),
                io.Clip.Input("clip", tooltip="SD 1.5's text encoder."),
                _folder_input(),
                io.Int.Input(
                    "steps",
                    default=300,
                    min=1,
                    max=1_000_000,
                    tooltip="The paper trains for 40,000.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=8,
                    min=1,
                    max=1024,
                    tooltip="Examples in each step. The paper has 128.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=1e-7,
                    max=1.0,
                    step=1e-7,
                    tooltip="The paper's is 0.0001.",
                ),
                io.Boolean.Input(
                    "masked_loss",
                    default=False,
                    tooltip="Count the error inside the hole only, as the paper writes it. Off: everywhere, as "
                    "the official code does.",
                ),
                *_settings_inputs("sem_inpainter"),
                CatModelWire.Input(
                    "cat_model",
                    optional=True,
                    tooltip="Go on with this SemInpainter. Nothing connected, or none in it: a new one.",
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, folder, **_):
        return model_files.input_folder(folder)[1]

    @classmethod
    def execute(
        cls,
        clip_vision,
        clip,
        folder,
        steps,
        batch_size,
        learning_rate,
        masked_loss,
        precision,
        seed,
        filename_prefix,
        licence,
        cat_model=None,
    ) -> io.NodeOutput:
        micro = max(size for size in range(1, min(batch_size, 8) + 1) if batch_size % size == 0)
        settings = loop.Settings(
            steps, batch_size, micro, precision=PRECISIONS[precision], seed=seed
        )
        with messages.plain_errors():
            run = Run(
                "sem-inpainter",
                learning_rate,
                folder,
                filename_prefix,
                settings,
                licence,
                cat_model,
            )
            if run.tensors:
                config = cat_model.architecture.sem_inpainter
                check_clip_vision(clip_vision, config.hidden_size, config.grid_size)
                encode_text(clip, "", config.text_size)
            else:
                check_clip_vision(clip_vision)
                config = start.sem_inpainter_config(
                    *clip_vision_sizes(clip_vision), encode_text(clip, "").shape[1]
                )
            source = run.encode(HostEncoders(clip_vision, clip))

            def build():
                modules = run.modules(config)
                return Distillation(modules["sem_inpainter"], masked_loss), modules

            return run.train(source, build)


class CATTrainRefAdapter(io.ComfyNode):
    """Stage 2: RefAdapter learns to use the visual prompt; the U-Net stays as it is."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CATTrainRefAdapter",
            display_name="CAT Train RefAdapter",
            category=f"{CATEGORY}/training",
            search_aliases=["finetune", "train stage 2", "训练"],
            description="Train a RefAdapter for an inpainting model on a folder of examples, anew or from a CAT model. Cancel "
            "keeps what was learned so far.",
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="An SD 1.5 inpainting model (9 input channels). It is not changed.",
                ),
                io.ClipVision.Input("clip_vision", tooltip=CLIP_VISION_TOOLTIP),
                io.Clip.Input("clip", tooltip="SD 1.5's text encoder."),
                io.Vae.Input("vae", tooltip="SD 1.5's VAE."),
                _folder_input(),
                io.Int.Input(
                    "size",
                    default=512,
                    min=64,
                    max=2048,
                    step=64,
                    tooltip="Side to which every picture is scaled, in pixels. The paper has 512.",
                ),
                io.Int.Input(
                    "steps",
                    default=300,
                    min=1,
                    max=1_000_000,
                    tooltip="The paper trains for 40,000.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=4,
                    min=1,
                    max=1024,
                    tooltip="Examples in each step. The paper has 128.",
                ),
                io.Int.Input(
                    "micro_batch_size",
                    default=1,
                    min=1,
                    max=1024,
                    tooltip="Examples that go through the model at once; batch_size must be a multiple of it. More is "
                    "faster and takes more memory, the result is the same.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=False,
                    tooltip="Compute activations again instead of keeping them: less memory, a third more time.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=1e-7,
                    max=1.0,
                    step=1e-7,
                    tooltip="The paper's is 0.0001.",
                ),
                *_settings_inputs("ref_adapter"),
                CatModelWire.Input(
                    "cat_model",
                    optional=True,
                    tooltip="Go on with this RefAdapter. Nothing connected, or none in it: a new one.",
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, folder, **_):
        return model_files.input_folder(folder)[1]

    @classmethod
    def execute(
        cls,
        model,
        clip_vision,
        clip,
        vae,
        folder,
        size,
        steps,
        batch_size,
        micro_batch_size,
        checkpointing,
        learning_rate,
        precision,
        seed,
        filename_prefix,
        licence,
        cat_model=None,
    ) -> io.NodeOutput:
        settings = loop.Settings(
            steps, batch_size, micro_batch_size, precision=PRECISIONS[precision], seed=seed
        )
        with messages.plain_errors():
            run = Run(
                "ref-adapter", learning_rate, folder, filename_prefix, settings, licence, cat_model
            )
            check_trainable(model)
            if run.tensors:
                config = cat_model.architecture.ref_adapter
            else:
                config = start.ref_adapter_config(
                    model.model.diffusion_model.state_dict(),
                    unet_heads(model),
                    clip_vision_sizes(clip_vision)[0],
                )
            check_unet(model, config)
            check_clip_vision(clip_vision, config.visual_size)
            source = run.encode(HostEncoders(clip_vision, clip, vae, model), size, vae_cell(vae))
            check_context(model, source.empty_context)

            def build():
                modules = run.modules(config) | {"unet": trainable_unet(unet_of(model))}
                denoiser = Denoiser(modules["unet"], modules["ref_adapter"], checkpointing)
                return Diffusion(denoiser, stable_diffusion_schedule()), modules

            return run.train(source, build)


class Run:
    """One run: the folder's examples, encoded once into memory, the loop, and the file of the trained part."""

    def __init__(
        self,
        stage: str,
        rate: float,
        folder: str,
        filename_prefix: str,
        settings: loop.Settings,
        licence: str,
        cat_model: CatModel | None,
    ):
        loop.require_accelerate()
        model_files.new_path(filename_prefix)  # refused now rather than after the run
        self.part = STAGES[stage].rates[0][0]
        self.stage = replace(STAGES[stage], rates=((self.part, rate),))
        self.folder, self.filename_prefix, self.settings, self.licence = (
            folder,
            filename_prefix,
            settings,
            licence,
        )
        self.cat_model = cat_model
        self.tensors = part_tensors(cat_model, self.part, torch.float32)
        self.path, _ = model_files.input_folder(folder)
        self.records, self.report = _examples(self.path)
        self.bar = messages.progress_bar(len(masks.VARIANTS) * len(self.records) + settings.steps)

    def encode(self, encoders: HostEncoders, size: int = 512, cell: int = 8) -> samples.Source:
        """Run the frozen networks over all examples; names those that cannot be used."""
        fresh = samples.Fresh(self.records, self.path, encoders, self.stage.objective, size, cell)
        fresh.report = self.report
        store = samples.Kept(fresh)
        usable = 0
        for index in range(len(store)):
            for variant in masks.VARIANTS:
                memory.raise_if_cancelled()
                usable += store.usable(index, variant) is not None
                self.bar.update(1)
        if not usable:
            raise ValueError(
                f"There is nothing to train on in {self.path}. {self.skipped() or 'No example was found.'} "
                f"{EXPECTED}"
            )
        empty = encoders.context([""]) if self.stage.objective == "diffusion" else None
        return samples.Source(store, self.settings.batch_size, self.settings.seed, empty)

    def skipped(self) -> str:
        """A sentence about the examples that cannot be used, or nothing."""
        reasons = [
            f"{reason}: {', '.join(self.report.examples[reason][:5])}{' ...' * (count > 5)}"
            for reason, count in self.report.skipped.items()
        ]
        return (
            f"Skipped {sum(self.report.skipped.values())} examples ({'; '.join(reasons)})."
            if reasons
            else ""
        )

    def modules(self, config) -> dict:
        """The part that is trained, in fp32, and nothing else; `config` describes it from here on."""
        self.architecture = replace(
            self.cat_model.architecture if self.cat_model else Architecture(), **{self.part: config}
        )
        alone = replace(Architecture(), **{self.part: config})
        return start.trainable_parts(
            alone, {self.part: self.tensors} if self.tensors else {}, self.settings.seed
        )

    def train(self, source: samples.Source, build) -> io.NodeOutput:
        """Train what `build` makes: (objective, modules). The host's own models are not touched."""
        history, shown = [], time.monotonic()

        def encoded(step, positions):
            memory.raise_if_cancelled()
            return {
                key: value.clone() for key, value in source(step, positions).items()
            }  # free of inference mode

        def on_step(step, figures):
            nonlocal shown
            history.append(figures)
            picture = None
            if (
                time.monotonic() - shown > 1 or step == self.settings.steps
            ):  # the last preview is the result's
                picture, shown = (
                    ("PNG", plots.curves(history, self.settings.steps), None),
                    time.monotonic(),
                )
            self.bar.update_absolute(self.bar.total - self.settings.steps + step, preview=picture)
            memory.raise_if_cancelled()

        memory.clear_memory()
        with torch.inference_mode(False), torch.enable_grad(), _own_accelerate():
            objective, modules = build()
            cpu = memory.on_cpu()
            try:
                loop.train(
                    self.stage,
                    objective,
                    modules,
                    encoded,
                    None,
                    self.settings,
                    self.architecture,
                    provenance="",
                    licence="",
                    cpu=cpu,
                    on_step=on_step,
                )
            except memory.Cancelled:
                if history:
                    path = self.save(modules, len(history))
                    messages.say(
                        f"Cancelled after {len(history)} of {self.settings.steps} steps. The weights so far are in "
                        f"{path.name}; connect them to cat_model to go on."
                    )
                raise
            path = self.save(modules, len(history))
            del objective, modules
        memory.clear_memory()
        messages.say(f"Saved as {path.name}. {self.skipped()}")
        image = torch.from_numpy(
            np.array(plots.curves(history, self.settings.steps), np.float32) / 255
        )[None]
        return io.NodeOutput(
            build_cat_model(model_files.read_path(path)), image, ui=ui.PreviewImage(image)
        )

    def save(self, modules, steps: int) -> Path:
        """Write the trained part, and beside it the other one that came in, under a new name."""
        parts = {
            part: tensors
            for part in ("sem_inpainter", "ref_adapter")
            if part != self.part and (tensors := part_tensors(self.cat_model, part))
        }
        parts[self.part] = modules[self.part].state_dict()
        path, origin = (
            Path(model_files.new_path(self.filename_prefix)),
            f", from {self.cat_model.name}" if self.cat_model else "",
        )
        weights.write_cat_weights(
            path,
            parts,
            self.architecture,
            licence=self.licence,
            provenance=f"trained in ComfyUI on "
            f"folder {self.folder}{origin}; stage {self.stage.name}, {steps} steps",
        )
        return path


def _examples(path: Path) -> tuple[list[manifest.Record], tally.Tally]:
    """The records of a folder's manifest, or of its triples; the report counts what is none."""
    report, records = tally.Tally(), []
    if (path / "manifest.jsonl").exists():
        return manifest.read(path / "manifest.jsonl", "train"), report
    for found in triples(Folder(path, ""), "train"):
        if found.record is None:
            report.skip(found.reason, found.id)
        else:
            records.append(found.record)
    return records, report


@contextmanager
def _own_accelerate():
    """Accelerate keeps one state a process, fixed by whoever comes first: give the run its own and put the other back."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in states]
    try:
        for state in states:
            state.clear()
        yield
    finally:
        for state, content in zip(states, before):
            state.clear()
            state.update(content)
