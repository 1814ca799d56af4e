"""tools/test.py: which runs a command line asks for, and that pytest gets what a user wrote."""

import importlib.util
import subprocess
import sys

import pytest
from paths import ROOT

from comfyui import install

pytestmark = pytest.mark.slow

HERE = "tests/core/test_test_command.py"


@pytest.fixture(scope="module")
def command():
    """The command as a module; `test` alone is a package of Python's own."""
    spec = importlib.util.spec_from_file_location("test_command", ROOT / "tools/test.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_arguments_everything_runs(command):
    versions = [version for version, _ in command.plan(None, False, [])]
    assert versions == [install.NEWEST, install.NEWEST, command.OLDER]
    assert command.plan(command.OLDER, False, []) == [(command.OLDER, [])]


@pytest.mark.parametrize(
    "given, passed_on",
    [
        (["-k", "core"], ["-k", "core"]),
        (["--lf"], ["--lf"]),
        (["tests/core/test_weights.py::test_x"], ["core/test_weights.py::test_x"]),
        (["core/test_weights.py", "-x"], ["core/test_weights.py", "-x"]),
        (["tests"], ["."]),
        (["tests/none.py"], ["tests/none.py"]),  # pytest says that it is not there
    ],
)
def test_arguments_of_pytest_are_one_run_with_just_these(command, given, passed_on):
    assert command.plan(None, False, given) == [(install.NEWEST, passed_on)]
    assert command.plan(command.OLDER, False, given) == [(command.OLDER, passed_on)]


def test_fast_runs_no_more_than_the_paths_that_are_named(command):
    ((_, selection),) = command.plan(None, True, ["tests/core/test_tree.py", "-x"])
    assert selection == ["-m", "not slow", "core/test_tree.py", "-x"]


def test_fast_keeps_what_is_selected(command):
    ((version, selection),) = command.plan(None, True, ["-k", "weights"])
    assert version == install.NEWEST
    assert selection == [*command.FAST, "-k", "weights"]


@pytest.mark.parametrize(
    "words, selected",
    [
        ([f"{HERE}::test_fast_keeps_what_is_selected"], 1),
        ([HERE, "-k", "without_arguments"], 1),
        ([HERE, "-k", "fast or without"], 3),
    ],
)
def test_a_documented_command_selects_what_it_says(words, selected):
    run = subprocess.run(
        [sys.executable, ROOT / "tools/test.py", *words, "--collect-only", "-q"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    collected = [line for line in run.stdout.splitlines() if line.startswith("core/")]
    assert len(collected) == selected, run.stdout
