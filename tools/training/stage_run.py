"""One stage of training, as tools/train.py runs it: load, build, encode, train."""

import gc
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cat_diffusion.cat_core.data.manifest_records import ManifestRecords
from cat_diffusion.cat_core.errors import CatError
from cat_diffusion.cat_core.files import require_writable
from cat_diffusion.cat_core.training import checkpoints, fsdp, identity, loop, trackers
from cat_diffusion.cat_core.training.batches import default_workers
from cat_diffusion.cat_core.training.encoding import Preparation
from cat_diffusion.cat_core.training.mixture import Mixture
from cat_diffusion.cat_core.training.settings import Settings, TrainingError, TrainingRun
from cat_diffusion.cat_core.training.shards import ShardedSamples
from cat_diffusion.cat_core.training.stages import STAGES, Stage
from cat_diffusion.cat_core.training.stores import FreshSamples
from cat_diffusion.cat_core.training.validation import Validation, validation_batches
from cat_diffusion.cat_core.weights import Checkpoint, trained_stages
from cat_diffusion.nodes.host import memory
from cat_diffusion.nodes.host.encoders import HostEncoders

from . import presets, stage_parts
from .sample_pictures import SamplePictures

OFFICIAL_CAPTION_SHARE = 0.2


@dataclass(frozen=True)
class StageRun:
    """One stage: from what, on what, how, and where it is kept."""

    stage: Stage
    base: Sequence[Path]  # files to start from; of parts that several have, the last one's
    data: Path  # manifest
    folder: Path  # for checkpoints and log; continued if it exists
    settings: Settings
    split: str = "train"  # of the manifest
    cache: Path | None = None  # folder for encoded samples
    cache_dtype: str = "fp16"  # one of stages.CACHE_DTYPES
    size: int = 512  # side of the pictures for the VAE, in pixels
    pictures: str = "squash"  # one of stages.PICTURES
    flip: bool = False  # mirror half of the crops
    caption_share: float | None = None  # see encoding.Preparation
    more_data: Sequence[Path] = ()  # further manifests
    weights: Sequence[float] | None = None  # of all manifests; None: each record weighs the same
    masked: bool = False  # the paper's loss for SemInpainter instead of the official code's
    checkpointing: bool = False  # compute activations again
    lora_rank: int = stage_parts.LORA_RANK  # of the U-Net's LoRA, where the stage trains one
    validate_every: int = 0  # steps between validations; 0 = never
    validation_split: str = "validation"  # of the manifest
    validation_samples: int = 64
    samples_every: int = 0  # steps between sheets of sample pictures; 0 = never
    licence: str = "unknown"  # of the result
    data_licence: str = "unknown"
    preset: str = ""  # one of presets.PRESETS, whose card the choices are meant for
    workers: int | None = None  # that prepare samples ahead; None chooses by the cores
    cpu: bool = False  # do not use a GPU

    def records(self, split: str) -> ManifestRecords:
        """The records of all manifests."""
        return ManifestRecords([self.data, *self.more_data], split)

    @property
    def how(self) -> Preparation:
        """How samples are made of records."""
        return Preparation(
            self.stage.objective,
            self.size,
            pictures=self.pictures,
            flip=self.flip,
            caption_share=self.caption_share,
            reads=self.stage.reads,
        )


def command(arguments) -> int:
    """Run the stage that the arguments name; returns the exit code.

    Of several processes the first one speaks for all, but each says what ends it.
    """
    process = int(os.environ.get("RANK", "0"))
    try:
        file = run(asked_for(arguments))
        if process == 0:
            print(f"\nCAT weights: {file}")
            _print_best(arguments.run / checkpoints.BEST)
    except KeyboardInterrupt:
        if process == 0:
            print(f"\nStopped. The same command continues from {arguments.run}.")
        return 130
    except CatError as error:
        whose = f" in process {process + 1}" if process else ""
        print(f"\nerror{whose}: {error}", file=sys.stderr)
        return 1
    return 0


def _print_best(path: Path) -> None:
    """Say which checkpoint is the best one, where it is kept."""
    if path.is_file():
        best = json.loads(path.read_text(encoding="utf-8"))
        # Older versions knew no other file.
        file = path.with_name(best["checkpoint"]) / best.get("file", checkpoints.WEIGHTS)
        print(f"Lowest validation loss, {best['validation_loss']:.4g}: {file}")


def asked_for(arguments) -> StageRun:
    """What tools/train.py's command line asks for."""
    settings = Settings(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        micro_batch_size=arguments.micro_batch_size,
        warmup=arguments.warmup,
        final_rate=final_rate(arguments),
        max_grad_norm=arguments.max_grad_norm,
        ema_decay=arguments.ema_decay if arguments.use_ema else 0.0,
        snr_gamma=arguments.snr_gamma,
        use_8bit_adam=arguments.use_8bit_adam,
        dynamo_backend=arguments.dynamo_backend,
        fsdp=arguments.fsdp,
        precision=arguments.precision,
        seed=arguments.seed,
        save_every=arguments.save_every,
        keep=arguments.checkpoints_total_limit,
        keep_best=arguments.keep_best,
        patience=arguments.patience,
        report_to=arguments.report_to,
    )
    return StageRun(
        stage=STAGES[arguments.stage].scaled(arguments.rates),
        base=arguments.base,
        data=arguments.data[0],
        more_data=arguments.data[1:],
        weights=arguments.weights,
        folder=arguments.run,
        settings=settings,
        split=arguments.split,
        cache=arguments.cache,
        cache_dtype=arguments.cache_dtype,
        size=arguments.size,
        pictures=arguments.pictures,
        flip=arguments.random_flip,
        caption_share=caption_share(arguments),
        masked=arguments.masked,
        checkpointing=arguments.checkpointing,
        lora_rank=arguments.lora_rank,
        validate_every=arguments.validate_every,
        validation_split=arguments.validation_split,
        validation_samples=arguments.validation_samples,
        samples_every=arguments.samples_every,
        licence=arguments.licence,
        data_licence=arguments.data_licence,
        preset=arguments.preset,
        workers=arguments.dataloader_num_workers,
        cpu=arguments.cpu,
    )


def final_rate(arguments) -> float:
    """What is left of the rates at the end."""
    if arguments.final_rate is not None:
        return arguments.final_rate
    return 0.0 if arguments.lr_scheduler == "cosine" else 1.0


def caption_share(arguments) -> float | None:
    """Of the samples, those that captions describe; None leaves each network its own kind."""
    if arguments.caption_share is None and arguments.pictures == "crop":
        return OFFICIAL_CAPTION_SHARE
    return arguments.caption_share


def run(described: StageRun) -> Path | None:
    """Load, build, cache, train; returns the CAT weights file.

    Raises:
        CatError: files that do not fit, or a run that cannot go on.
    """
    stage = described.stage
    loop.require_accelerate()
    processes = loop.process_state(described.cpu)
    if described.preset:
        card, gigabytes = memory.card(processes.device)
        try:
            presets.refuse_smaller_card(described.preset, card, gigabytes)
        except presets.PresetError as error:
            raise TrainingError(str(error)) from error
    _require_all_it_takes(described, processes.num_processes)
    _require_own_device(processes)
    records = described.records(described.split)
    mixture = Mixture(records.lengths, described.settings.seed, described.weights)
    file = stage_parts.load(described.base, stage.diffusion)
    if "unet_lora" in file.parts and stage.diffusion and "unet_lora" not in stage.parts:
        print(f"The LoRA of the files is left out: {stage.name} takes the U-Net without it.")
    modules, objective = stage_parts.build(
        stage,
        file,
        described.settings.seed,
        masked=described.masked,
        checkpointing=described.checkpointing,
        lora_rank=described.lora_rank,
        snr_gamma=described.settings.snr_gamma,
    )
    training = TrainingRun(
        stage,
        modules,
        objective,
        described.settings,
        folder=described.folder,
        identity=identity_of(described, file, records),
        architecture=file.architecture,
        provenance=f"trained on {_names(described)}",
        licence=described.licence,
        data=_data_of(described, records),
        earlier=trained_stages.of_parts(trained_stages.of_header(file.metadata), stage.parts),
    )
    checkpoints.refuse_another_run(training)
    encoders, store = stage_parts.encoded_samples(
        file,
        stage.objective,
        described.data,
        split=described.split,
        size=described.size,
        cache=described.cache,
        processes=processes,
        how=described.how,
        records=records,
        cache_dtype=described.cache_dtype,
    )
    fresh = store.fresh if isinstance(store, ShardedSamples) else store
    workers = described.workers
    if workers is None:
        workers = default_workers(processes_of_this_machine())
    batches = stage_parts.batches_for(stage, encoders, store, described.settings, workers, mixture)
    pictures = None
    is_main = processes.process_index == 0
    if described.samples_every and described.settings.fsdp:
        if is_main:
            print("No sample pictures are drawn: with --fsdp no process has all of the weights.")
    elif described.samples_every:
        pictures = SamplePictures(
            stage=stage,
            file=file,
            modules=modules,
            encoders=encoders,
            fresh=fresh,
            folder=described.folder / "samples",
            seed=described.settings.seed,
        )
    validation = None
    if described.validate_every and (is_main or described.settings.fsdp):
        held_out = validation_batches(
            validation_samples(described, encoders, fresh.cell),
            batches.empty_context,
            samples=described.validation_samples,
            micro_batch_size=described.settings.micro_batch_size,
        )
        validation = Validation(objective, held_out, described.validate_every)
    if described.cache and not pictures:
        # The frozen networks have done their work: their memory is wanted.
        del file, encoders, fresh.encoders
        memory.clear_memory()
        gc.collect()

    def on_step(step, figures):
        if pictures and step % described.samples_every == 0:
            pictures.draw(step)

    try:
        return loop.train(
            training, batches, cpu=described.cpu, validation=validation, on_step=on_step
        )
    finally:
        if fresh.tally.skipped:
            print(f"\n{fresh.tally}")


def _data_of(described: StageRun, records: ManifestRecords) -> dict[str, str | int | list[str]]:
    """What a model card says of a run's data."""
    manifests = [path.name for path in (described.data, *described.more_data)]
    return {
        "manifests": manifests,
        "records": len(records),
        "split": described.split,
        "licence": described.data_licence,
        "base": [path.name for path in described.base],
        "pictures": described.pictures,
        "size": described.size,
    }


def _names(described: StageRun) -> str:
    return ", ".join(path.name for path in (described.data, *described.more_data))


def validation_samples(described: StageRun, encoders: HostEncoders, cell: int) -> FreshSamples:
    """The records that a run is validated on, squashed as evaluation sees them."""
    records = described.records(described.validation_split)
    return FreshSamples(
        records,
        records.folder,
        encoders,
        objective=described.stage.objective,
        size=described.size,
        cell=cell,
        caption_share=described.caption_share,
        reads=described.stage.reads,
    )


def identity_of(
    described: StageRun, file: Checkpoint, records: ManifestRecords
) -> dict[str, str | int | float | bool]:
    """What a run's result follows from besides stage and settings.

    Whether samples come from a cache is left out: its half precision is rounding, and its shards
    know the files that they were made of.
    """
    stage = described.stage
    parts = [*stage_parts.frozen_parts(stage.objective), *stage.parts]
    if stage.diffusion:
        parts.append("unet")
    if stage.prompt:
        parts.append("ref_adapter")
    if stage.prompt == "predicted":
        parts.append("sem_inpainter")
    facts = {
        "masked": described.masked,
        "preprocessing": identity.PREPROCESSING,
        **identity.of_records(records),
        **identity.of_parts(file, dict.fromkeys(parts)),
    }
    facts |= identity.of_preparation(described.how)
    if stage.diffusion:
        facts["size"] = described.size
    if described.weights:
        facts["weights of manifests"] = " ".join(f"{weight:g}" for weight in described.weights)
    if "unet_lora" in stage.parts:
        facts["lora_rank"] = described.lora_rank
    if described.cache is None:
        facts |= identity.of_sizes(records, records.folder)
    return facts


def _require_all_it_takes(described: StageRun, processes: int) -> None:
    """Raise TrainingError for what would end the run after hours of encoding."""
    loop.check_batch_size(described.settings, processes)
    loop.check_precision(described.settings.precision, described.cpu)
    fsdp.refuse(described.settings, processes)
    trackers.require(described.settings.report_to)
    for folder in (described.folder, described.cache):
        if folder is None:
            continue
        try:
            require_writable(folder)
        except OSError as error:
            raise TrainingError(
                f"Cannot write to {folder} ({error}). Check free space and permissions, or give "
                "another folder."
            ) from error


def _require_own_device(processes) -> None:
    """Say where each of several processes works; TrainingError unless both engines agree on it.

    Args:
        processes: accelerate's PartialState.
    """
    if processes.num_processes == 1:
        return
    name = f"Process {processes.process_index + 1} of {processes.num_processes}"
    encodes_on = memory.compute_device()
    if not _is_same(encodes_on, processes.device):
        raise TrainingError(
            f"{name} was given {processes.device} for training, ComfyUI encodes on {encodes_on}. "
            "Start no more processes than there are GPUs, or all with --cpu."
        )
    # In one write: processes share the terminal.
    sys.stdout.write(f"{name}: encodes on {encodes_on}, trains on {processes.device}\n")
    sys.stdout.flush()


def processes_of_this_machine() -> int:
    """How many processes of the run share the machine, as launchers tell each of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _is_same(one: torch.device, other: torch.device) -> bool:
    """Whether two names mean one device; without a number it is the first."""
    return one.type == other.type and (one.index or 0) == (other.index or 0)
