"""Nodes that train SemInpainter and RefAdapter on a folder of examples.

They are for small runs; tools/train.py, on the same loop, is for long ones.
"""

from functools import partial

from comfy_api.latest import io

from ..cat_core.training.assemble import assemble
from ..cat_core.training.settings import Settings
from ..cat_core.training.stages import STAGES
from ..cat_core.training.start import ref_adapter_config, sem_inpainter_config
from .checks import check_choice, check_number, check_switch, check_wires, is_broken, shown
from .folder_training import EXPECTED, FolderTraining
from .host import messages, model_files
from .host.clip import check_clip_vision, clip_vision_sizes, encode_text
from .host.denoiser import Denoiser, trainable_unet, unet_of
from .host.encoders import HostEncoders
from .host.unet import (
    check_context,
    check_trainable,
    check_unet,
    unet_heads,
    unet_weights,
    vae_cell,
)
from .visual_prompt import CLIP_VISION_TOOLTIP
from .wires import CATEGORY, CatModelWire

MOST_STEPS = 1_000_000
MOST_EXAMPLES = 1024  # of a batch
LEAST_RATE = 1e-7
HIGHEST_RATE = 1e30  # by wire: the loss says which is too high
LARGEST_SEED = 2**63 - 1
SMALLEST_SIDE = 64  # pixels
LARGEST_SIDE = 2048
MOST_AT_ONCE = 8  # examples that SemInpainter takes at once
PRECISIONS = {"fp32": "no", "bf16": "bf16"}


def _steps_input() -> io.Int.Input:
    return io.Int.Input(
        "steps",
        default=300,
        min=1,
        max=MOST_STEPS,
        tooltip="The paper trains for 40,000.",
    )


def _batch_size_input(default: int) -> io.Int.Input:
    return io.Int.Input(
        "batch_size",
        default=default,
        min=1,
        max=MOST_EXAMPLES,
        tooltip="Examples in each step. The paper has 128.",
    )


def _learning_rate_input() -> io.Float.Input:
    return io.Float.Input(
        "learning_rate",
        default=1e-4,
        min=LEAST_RATE,
        max=1.0,
        step=1e-7,
        tooltip="The paper's is 0.0001.",
    )


def _settings_inputs(prefix: str) -> list:
    """What both nodes ask for at the end."""
    return [
        io.Combo.Input(
            "precision",
            options=list(PRECISIONS),
            default="fp32",
            tooltip="bf16 is faster and takes less memory on recent GPUs. The weights are fp32 "
            "in any case.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=LARGEST_SEED,
            # A seed that changed by itself would start the training again with every prompt.
            control_after_generate=False,
            tooltip="Fixes the new weights, the order of the examples and the noise.",
        ),
        io.String.Input(
            "filename_prefix",
            default=prefix,
            tooltip="Beginning of the file's name in models/cat_diffusion. A number follows; "
            "nothing is overwritten.",
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
            description="Train a SemInpainter on a folder of examples, anew or from a CAT model. "
            "Cancel keeps what was learned so far.",
            is_output_node=True,
            inputs=[
                io.ClipVision.Input(
                    "clip_vision", tooltip=CLIP_VISION_TOOLTIP + " It is the teacher."
                ),
                io.Clip.Input("clip", tooltip="SD 1.5's text encoder."),
                _folder_input(),
                _steps_input(),
                _batch_size_input(8),
                _learning_rate_input(),
                io.Boolean.Input(
                    "masked_loss",
                    default=False,
                    tooltip="Count the error inside the hole only, as the paper writes it. "
                    "Off: everywhere, as the official code does.",
                ),
                *_settings_inputs("sem_inpainter"),
                CatModelWire.Input(
                    "cat_model",
                    optional=True,
                    tooltip="Go on with this SemInpainter. Nothing connected, or none in it: "
                    "a new one.",
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
        settings = _checked_settings(steps, batch_size, precision, seed, learning_rate)
        check_wires(clip_vision=clip_vision, clip=clip)
        check_switch("masked_loss", masked_loss)
        _check_texts(folder, filename_prefix, licence, cat_model)
        with messages.plain_errors():
            training = FolderTraining(
                STAGES["sem-inpainter"],
                settings,
                rate=learning_rate,
                folder=folder,
                filename_prefix=filename_prefix,
                licence=licence,
                cat_model=cat_model,
            )
            if training.tensors:
                config = cat_model.architecture.sem_inpainter
                check_clip_vision(clip_vision, config.hidden_size, config.grid_size)
                encode_text(clip, "", config.text_size)  # raises where the CLIP does not fit
            else:
                # A new SemInpainter imitates the CLIP vision model, in depth and width.
                check_clip_vision(clip_vision)
                width, layers, heads = clip_vision_sizes(clip_vision)
                config = sem_inpainter_config(
                    width=width,
                    layers=layers,
                    heads=heads,
                    text_size=encode_text(clip, "").shape[1],
                )
            batches = training.encode(HostEncoders(clip_vision, clip))

            def build():
                modules = training.trainable(config)
                return assemble(training.stage, modules, Denoiser, masked=masked_loss), modules

            return training.train(batches, build, config)


class CATTrainRefAdapter(io.ComfyNode):
    """Stage 2: RefAdapter learns to use the visual prompt; the U-Net stays as it is."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CATTrainRefAdapter",
            display_name="CAT Train RefAdapter",
            category=f"{CATEGORY}/training",
            search_aliases=["finetune", "train stage 2", "训练"],
            description="Train a RefAdapter for an inpainting model on a folder of examples, anew "
            "or from a CAT model. Cancel keeps what was learned so far.",
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
                    min=SMALLEST_SIDE,
                    max=LARGEST_SIDE,
                    step=64,
                    tooltip="Side to which every picture is scaled, in pixels. The paper has 512.",
                ),
                _steps_input(),
                _batch_size_input(4),
                io.Int.Input(
                    "micro_batch_size",
                    default=1,
                    min=1,
                    max=MOST_EXAMPLES,
                    tooltip="Examples that go through the model at once; batch_size must be a "
                    "multiple of it. More is faster and takes more memory, the result is the same.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=False,
                    tooltip="Compute activations again instead of keeping them: less memory, "
                    "a third more time.",
                ),
                _learning_rate_input(),
                *_settings_inputs("ref_adapter"),
                CatModelWire.Input(
                    "cat_model",
                    optional=True,
                    tooltip="Go on with this RefAdapter. Nothing connected, or none in it: "
                    "a new one.",
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
        settings = _checked_settings(
            steps, batch_size, precision, seed, learning_rate, micro_batch_size
        )
        check_wires(model=model, clip_vision=clip_vision, clip=clip, vae=vae)
        check_number("size", size, SMALLEST_SIDE, LARGEST_SIDE, whole=True)
        check_switch("checkpointing", checkpointing)
        _check_texts(folder, filename_prefix, licence, cat_model)
        with messages.plain_errors():
            training = FolderTraining(
                STAGES["ref-adapter"],
                settings,
                rate=learning_rate,
                folder=folder,
                filename_prefix=filename_prefix,
                licence=licence,
                cat_model=cat_model,
            )
            check_trainable(model)
            if training.tensors:
                config = cat_model.architecture.ref_adapter
            else:
                unet = unet_weights(model)
                visual_size, *_ = clip_vision_sizes(clip_vision)
                config = ref_adapter_config(unet, unet_heads(model), visual_size)
            check_unet(model, config)
            check_clip_vision(clip_vision, config.visual_size)
            encoders = HostEncoders(clip_vision, clip, vae, model)
            batches = training.encode(encoders, size, vae_cell(vae))
            check_context(model, batches.empty_context)

            def build():
                modules = training.trainable(config)
                modules["unet"] = trainable_unet(unet_of(model))
                denoiser = partial(Denoiser, checkpointing=checkpointing)
                return assemble(training.stage, modules, denoiser), modules

            return training.train(batches, build, config)


def _checked_settings(
    steps, batch_size, precision, seed, learning_rate, micro_batch_size=None
) -> Settings:
    """What both nodes ask for, as the loop takes it; raises ValueError for what is out of range.

    Args:
        micro_batch_size: None for as many examples at once as divide the batch.
    """
    check_number("steps", steps, 1, MOST_STEPS, whole=True)
    check_number("batch_size", batch_size, 1, MOST_EXAMPLES, whole=True)
    if micro_batch_size is None:
        micro_batch_size = _largest_divisor(batch_size, MOST_AT_ONCE)
    check_number("micro_batch_size", micro_batch_size, 1, MOST_EXAMPLES, whole=True)
    check_number("learning_rate", learning_rate, LEAST_RATE, HIGHEST_RATE)
    check_choice("precision", precision, list(PRECISIONS))
    check_number("seed", seed, 0, LARGEST_SEED, whole=True)
    return Settings(
        steps=steps,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        precision=PRECISIONS[precision],
        seed=seed,
    )


def _check_texts(folder, filename_prefix, licence, cat_model) -> None:
    """Raise ValueError for what is no text, and for another wire than a CAT_MODEL."""
    for name, value in {"filename_prefix": filename_prefix, "licence": licence}.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} is {shown(value)}; expected a text. Type one.")
    if not isinstance(folder, str) or is_broken(folder) or "\0" in folder:
        raise ValueError(
            f"folder is {shown(folder)}; expected one in ComfyUI's input folder. "
            "Choose it from the list."
        )
    if cat_model is not None:
        check_wires(cat_model=cat_model)


def _largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is not above `most`."""
    return max(size for size in range(1, min(number, most) + 1) if number % size == 0)
