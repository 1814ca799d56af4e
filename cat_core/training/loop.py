"""One training loop for every stage: deterministic batches, exact resumption, one process or many.

A batch depends on the step alone (see batches.py), so a run that was killed continues with the
batches and noise that it would have seen, however many workers prepare them.
"""

import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

from ..files import InUseError, locked, remove_leftovers
from . import checkpoints, fsdp, trackers
from .average import MovingAverage
from .batches import BatchSource, Request, Stream
from .log import TrainingLog
from .optimisation import Optimisation, freeze_others, new_optimiser
from .settings import Settings, TrainingError, TrainingRun
from .validation import Validation, ValidationLog

MOST_SKIPPED = 10  # steps in a row
MOST_SKIPPED_FP16 = 20  # its scaler halves a scale of 65536 until numbers bear it
PATIENCE = timedelta(days=7)  # of processes that wait for each other, while one encodes samples
OnStep = Callable[[int, Mapping[str, float]], None]


def train(
    run: TrainingRun,
    source: BatchSource,
    *,
    cpu: bool = False,
    validation: Validation | None = None,
    on_step: OnStep | None = None,
) -> Path | None:
    """Train until the last step, from the newest complete checkpoint in the folder if there is one.

    Args:
        cpu: do not use a GPU even if there is one.
        validation: of the main process, with FSDP of all, for a run with a folder; None measures
            nothing.
        on_step: called in the main process after each step, with the number of steps done and their
            figures; what it raises ends the run between two steps.
    Returns:
        the CAT weights file of the last checkpoint, None without a folder.
    Raises:
        TrainingError: loss or gradients not finite for long, disk full, or settings that do not fit
            the machine, or the folder, in which another process may also be at work.
    """
    accelerator = _accelerator(run, cpu)
    check_batch_size(run.settings, accelerator.num_processes)
    fsdp.refuse(run.settings, accelerator.num_processes)
    with ExitStack() as stack:
        if run.folder and accelerator.is_main_process:
            stack.enter_context(_own_folder(run.folder))
        stack.callback(trackers.finish, accelerator)
        try:
            return _train(run, source, accelerator, validation, on_step)
        except RuntimeError as error:
            if accelerator.num_processes == 1 or not _is_of_another_process(error):
                raise
            raise TrainingError(
                f"Another process of the run has ended, and this one cannot go on alone ({error}). "
                f"The newest checkpoint is {checkpoints.newest_name(run.folder)}: start the same "
                "command again, which goes on from there."
            ) from error


def _is_of_another_process(error: RuntimeError) -> bool:
    """Whether an error says that a process which was waited for is gone."""
    of_backend = getattr(torch.distributed, "DistBackendError", ())
    return isinstance(error, of_backend) or "by peer" in str(error)


def _train(
    run: TrainingRun,
    source: BatchSource,
    accelerator,
    validation: Validation | None,
    on_step: OnStep | None,
) -> Path | None:
    """`train`, where nobody else trains in the folder."""
    settings = run.settings
    objective: nn.Module = run.objective  # pyright: ignore - a module besides
    freeze_others(run)
    if settings.fsdp:
        fsdp.shard(objective, accelerator)
    optimiser = new_optimiser(run, accelerator.device)
    average = None
    # With FSDP, of each process's pieces.
    if settings.ema_decay and (accelerator.is_main_process or settings.fsdp):
        average = MovingAverage(run.modules, run.stage.parts, settings.ema_decay)
    resumed = checkpoints.resume(run, optimiser, average)
    first = resumed.step
    if settings.fsdp:
        model = objective
        prepared = accelerator.prepare(optimiser)
    else:
        model, prepared = accelerator.prepare(objective, optimiser)
    requests = _Requests(settings, first, accelerator.num_processes, accelerator.process_index)
    batches = Stream(source, requests, accelerator.device)
    optimisation = Optimisation(run, accelerator, model, prepared)
    if accelerator.scaler is not None and resumed.scaler:
        accelerator.scaler.load_state_dict(resumed.scaler)
    log = None
    judge = None
    accelerator.wait_for_everyone()  # until all have read what is renamed now
    if run.folder and accelerator.is_main_process:
        checkpoints.set_aside(run, resumed)
        log = TrainingLog(run.folder / "log.csv", first, settings)
        trackers.start(accelerator, run, first)
        if validation:
            judge = ValidationLog(run.folder, first, settings)
    (ended,) = _anywhere(accelerator, judge is not None and judge.is_out_of_patience())
    if ended:
        _say_ended(accelerator, settings, first)
        return _newest_weights(run)

    with _Interrupt(accelerator.is_main_process) as interrupt:
        for step in range(first, settings.steps):
            start = time.monotonic()
            waited = batches.waited
            share = [next(batches) for _ in requests.of_step(step)]
            figures = optimisation.step(step, share)
            _check_progress(run, step, figures, optimisation)
            # Not while gradients are no numbers: the weights may be at fault, good ones would go.
            is_good = not optimisation.skipped_in_a_row
            if average and is_good:
                average.update(step + 1)
            seconds = time.monotonic() - start
            figures["images_per_second"] = settings.batch_size / seconds
            figures["waiting"] = (batches.waited - waited) / seconds
            done = step + 1
            if log:
                log.add(done, figures)
                _track(accelerator, "", done, figures)
            is_best = False
            ends = False
            # Before the checkpoint, so that a run which goes on from it knows what was measured.
            if validation and validation.is_due(done, settings.steps):
                measured = validation.measure(average)
                if judge:
                    judge.add(done, measured)
                    _track(accelerator, "validation/", done, measured)
                    is_best = settings.keep_best and judge.is_best
                    ends = judge.is_out_of_patience()
            stops, is_best, ends = _anywhere(accelerator, interrupt.asked, is_best, ends)
            is_due = done % settings.save_every == 0 or done == settings.steps
            if run.folder and is_good and (is_due or stops or is_best or ends):
                accelerator.wait_for_everyone()
                is_main = accelerator.is_main_process
                if is_main or settings.fsdp:
                    trained = checkpoints.Trained.of(run, optimiser, average, keep=is_main)
                if is_main:
                    last = judge.last if judge else None
                    checkpoints.write(run, done, trained, accelerator.scaler, last)
                    if judge and settings.keep_best:
                        checkpoints.remove_old(run, judge.best(), judge.judges_average)
                    else:
                        checkpoints.remove_old(run)
                accelerator.wait_for_everyone()
            if on_step and accelerator.is_main_process:
                on_step(done, figures)
            if stops:
                raise KeyboardInterrupt
            if ends:
                _say_ended(accelerator, settings, done)
                break
    return _newest_weights(run)


def _newest_weights(run: TrainingRun) -> Path | None:
    """The weights file of the latest checkpoint, None where there is none."""
    checkpoint = checkpoints.newest(run.folder)
    return checkpoint / checkpoints.WEIGHTS if checkpoint else None


@contextmanager
def _own_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, and remove what killed ones left unfinished there."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
            remove_leftovers(folder)
        except InUseError as error:
            raise TrainingError(
                f"Another process trains in {folder} already. Wait until it has ended, or give "
                "another folder."
            ) from error
        except OSError as error:
            raise TrainingError(
                f"Cannot write to {folder} ({error}). Checkpoints and log go there: check free "
                "space and permissions, or give another folder."
            ) from error
        yield


def require_accelerate() -> None:
    """Raise TrainingError unless this Python has what the loop is built on."""
    try:
        importlib.import_module("accelerate")
    except ModuleNotFoundError as error:
        raise TrainingError(
            f"Training needs {error.name}, which this Python does not have. Install it with: "
            f'"{sys.executable}" -m pip install "accelerate>=1.0"'
        ) from error


def process_state(cpu: bool):
    """accelerate's PartialState: which of the run's processes this is, and its own device.

    That device becomes the one that PyTorch, and so the host, takes if none is named: this has to
    be asked before the first network is built.
    """
    require_accelerate()
    from accelerate import PartialState

    # Only processes that meet have a time after which they give up.
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return PartialState(cpu=cpu, timeout=PATIENCE) if together else PartialState(cpu=cpu)


@dataclass(frozen=True)
class _Requests:
    """What one process asks of the batch source in the steps of a run."""

    settings: Settings
    first: int  # step
    num_processes: int
    process_index: int

    def __iter__(self) -> Iterator[Request]:
        for step in range(self.first, self.settings.steps):
            yield from self.of_step(step)

    def of_step(self, step: int) -> list[Request]:
        """The process's share of a global batch, in parts that go through the model at once."""
        micro = self.settings.micro_batch_size
        share = self.settings.batch_size // self.num_processes
        first = self.process_index * share
        starts = range(first, first + share, micro)
        return [(step, range(start, start + micro)) for start in starts]


def _accelerator(run: TrainingRun, cpu: bool):
    require_accelerate()
    from accelerate import Accelerator, DistributedDataParallelKwargs

    settings = run.settings
    check_precision(settings.precision, cpu)
    trackers.require(settings.report_to)
    # The diffusion stages have no use for SemInpainter's post_layernorm.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(
        cpu=cpu,
        mixed_precision=settings.precision,
        dynamo_backend=settings.dynamo_backend,
        log_with=settings.report_to or None,
        project_dir=run.folder,
        kwargs_handlers=[unused],
    )


def check_precision(precision: str, cpu: bool) -> None:
    """Raise TrainingError for a precision that the machine does not compute in."""
    has_cuda = torch.cuda.is_available() and not cpu
    has_mps = torch.backends.mps.is_available() and not cpu
    if precision == "fp16" and not (has_cuda or has_mps):
        raise TrainingError(
            "--precision fp16 needs a GPU, and there is none, or it is not used. Give bf16, or "
            "leave the option out to compute in fp32."
        )
    if precision == "bf16" and has_cuda and not torch.cuda.is_bf16_supported():
        raise TrainingError(
            f"--precision bf16 is nothing that {torch.cuda.get_device_name()} computes in. Give "
            "fp16, or leave the option out to compute in fp32."
        )


def check_batch_size(settings: Settings, processes: int = 1) -> None:
    """Raise TrainingError unless a batch can be shared out evenly."""
    if settings.batch_size % (settings.micro_batch_size * processes):
        raise TrainingError(
            f"batch_size {settings.batch_size} is not a multiple of micro_batch_size "
            f"{settings.micro_batch_size} times {processes} processes. Change one of them."
        )


def _check_progress(
    run: TrainingRun, step: int, figures: Mapping[str, float], optimisation: Optimisation
) -> None:
    """Raise TrainingError where too many steps in a row had to be skipped, or the last ones."""
    in_a_row = optimisation.skipped_in_a_row
    most = MOST_SKIPPED_FP16 if run.settings.precision == "fp16" else MOST_SKIPPED
    is_last = step + 1 == run.settings.steps
    if in_a_row >= most or (in_a_row and is_last):
        raise TrainingError(
            f"The loss of step {step + 1} is {figures['loss']} and its gradients are "
            f"{figures['grad_norm']} long, so it was skipped, like {in_a_row - 1} before it, while "
            "what they were computed of is finite. Nothing was overwritten; the newest good "
            f"checkpoint is {checkpoints.newest_name(run.folder)}. Lower the rates, warm up "
            "longer, clip gradients, or use bf16 instead of fp16."
        )


class _Interrupt:
    """Turn Ctrl-C and SIGTERM into a wish to stop after the step; a second one stops at once."""

    asked = False

    def __init__(self, says_so: bool):
        self.says_so = says_so

    def __enter__(self):
        self.previous = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # not the main thread: the caller has its own way to stop
                self.previous[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self.says_so:
            print(
                "\nStopping after this step; the run will be saved. "
                "Press Ctrl-C again to stop at once.",
                flush=True,
            )

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def _anywhere(accelerator, *flags: bool) -> list[bool]:
    """Which flags any process has raised; all processes then do the same after the same step."""
    raised = torch.tensor([float(flag) for flag in flags], device=accelerator.device)
    return (accelerator.reduce(raised) > 0).tolist()


def _track(accelerator, prefix: str, step: int, figures: Mapping[str, float]) -> None:
    """Tell the trackers what a step's figures are."""
    if accelerator.trackers:
        named = {f"{prefix}{name}": value for name, value in figures.items()}
        accelerator.log(named, step=step)


def _say_ended(accelerator, settings: Settings, step: int) -> None:
    """Say that a run is over before its last step."""
    if accelerator.is_main_process:
        print(
            f"\nThe last {settings.patience} validations were no better than one before: the run "
            f"ends after step {step}. A larger --patience, or none, goes on from there.",
            flush=True,
        )
