"""A run's figures in TensorBoard or Weights & Biases, by accelerate's trackers."""

import importlib
import sys
import uuid
from dataclasses import asdict

from ..files import write_text
from .settings import TrainingError, TrainingRun

# Tracker -> the package that it is made of.
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb"}
FOLDER = "tensorboard"  # of its event files, in the run's
PROJECT = "cat-diffusion"  # of all runs, in Weights & Biases
RUN_ID = "wandb-run.txt"  # in the run's folder, by which a run that goes on is found again


def require(name: str) -> None:
    """Raise TrainingError unless this Python has what a tracker is made of; "" needs nothing."""
    if not name:
        return
    package = TRACKERS[name]
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise TrainingError(
            f"--report-to {name} needs {package}, which cannot be imported ({error}). Install it "
            f'with: "{sys.executable}" -m pip install {package}; or leave the option out: the '
            "figures are in log.csv and validation.csv in any case."
        ) from error


def start(accelerator, run: TrainingRun, first: int) -> None:
    """Begin to track a run, or go on with one that has done `first` steps.

    What TensorBoard was told of later steps is hidden from then on; Weights & Biases keeps it, and
    takes no step twice.

    Raises:
        TrainingError: the tracker cannot start, as without an account.
    """
    if not run.settings.report_to or run.folder is None or not accelerator.is_main_process:
        return
    name = FOLDER
    options = {"tensorboard": {"purge_step": first + 1}}
    if run.settings.report_to == "wandb":
        name = PROJECT
        options = {"wandb": _wandb_options(run, first)}
    try:
        accelerator.init_trackers(name, init_kwargs=options)
    # Each tracker has errors of its own: no account, no network, no right to write.
    except Exception as error:
        raise TrainingError(
            f"--report-to {run.settings.report_to} cannot start ({error}). Mend that, or leave the "
            "option out: the figures are in log.csv and validation.csv in any case."
        ) from error


def finish(accelerator) -> None:
    """Write what the trackers still hold."""
    for tracker in getattr(accelerator, "trackers", []):
        tracker.finish()


def _wandb_options(run: TrainingRun, first: int) -> dict:
    """What wandb.init takes: a run that goes on has the number that it had."""
    assert run.folder is not None
    path = run.folder / RUN_ID
    if not first or not path.is_file():
        write_text(path, uuid.uuid4().hex)
    return {
        "id": path.read_text(encoding="utf-8").strip(),
        "resume": "allow",
        "name": run.folder.name,
        "dir": str(run.folder),
        "config": {"stage": run.stage.name, **asdict(run.settings)},
    }
