"""Files and folders that are whole or not there."""

import os
import subprocess
import sys

import pytest
from paths import ROOT

from cat_diffusion.cat_core import files


class Full(OSError):
    """As a disk raises it in the middle of writing."""


def names(folder):
    return sorted(os.listdir(folder))


def test_a_file_takes_the_place_of_an_older_one(tmp_path):
    path = tmp_path / "new folder/x.txt"
    files.write_text(path, "old")
    with files.replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == path.parent  # on one disk, or renaming would copy
    assert path.read_text() == "new"
    assert names(path.parent) == ["x.txt"]


def test_a_file_that_fails_leaves_the_older_one_and_nothing_else(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(Full), files.replacing(path) as partial:
        partial.write_text("half of the n")
        raise Full
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.txt"]


def test_a_folder_takes_the_place_of_an_older_one(tmp_path):
    path = tmp_path / "x"
    (path / "old").mkdir(parents=True)
    with files.replacing_folder(path) as partial:
        (partial / "new").touch()
        assert names(path) == ["old"]
    assert names(path) == ["new"]
    assert names(tmp_path) == ["x"]


def test_a_folder_that_fails_leaves_the_older_one_and_nothing_else(tmp_path):
    path = tmp_path / "x"
    (path / "old").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), files.replacing_folder(path) as partial:
        (partial / "new").touch()
        raise KeyboardInterrupt
    assert names(path) == ["old"]
    assert names(tmp_path) == ["x"]


def test_what_a_killed_process_left_of_a_folder_goes_first(tmp_path):
    path = tmp_path / "x"
    left = tmp_path / f"x.{ended_process()}.partial"
    left.mkdir()
    (left / "half").touch()
    with files.replacing_folder(path) as partial:
        assert names(partial) == []
        (partial / "new").touch()
    assert names(path) == ["new"]
    assert names(tmp_path) == ["x"]


def test_what_a_killed_process_left_of_a_file_goes_first_and_a_living_ones_stays(tmp_path):
    (tmp_path / f"x.txt.{ended_process()}.partial").touch()
    living = f"x.txt.{os.getppid()}.partial"
    (tmp_path / living).touch()
    (tmp_path / "film.partial").touch()  # another program's
    files.write_text(tmp_path / "x.txt", "new")
    assert names(tmp_path) == sorted(["film.partial", "x.txt", living])


def ended_process():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_a_private_file_gets_the_permissions_of_other_new_ones(tmp_path):
    (tmp_path / "other").touch()
    with files.replacing(tmp_path / "x") as partial:
        partial.unlink()
        os.close(os.open(partial, os.O_CREAT, 0o600))
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_lock_keeps_others_out_and_dies_with_its_process(tmp_path):
    code = """
import sys, time
from pathlib import Path
from cat_diffusion.cat_core import files
with files.locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""
    start = f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import comfyui\n{code}"
    words = [sys.executable, "-c", start, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(files.InUseError), files.locked(tmp_path):
            pass
        process.kill()
    with files.locked(tmp_path):
        pass


def test_texts_are_utf_8_with_plain_line_ends(tmp_path):
    files.write_text(tmp_path / "x.txt", "猫\n")
    assert (tmp_path / "x.txt").read_bytes() == "猫\n".encode()


def test_several_processes_may_ask_whether_a_folder_can_be_written(tmp_path):
    code = """
import sys
from pathlib import Path
from cat_diffusion.cat_core import files
print("ready", flush=True)
sys.stdin.readline()
for _ in range(1000):
    files.require_writable(Path(sys.argv[1]))
"""
    start = f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import comfyui\n{code}"
    words = [sys.executable, "-c", start, str(tmp_path / "new")]
    pipe = subprocess.PIPE
    asking = [
        subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(2)
    ]
    for process in asking:
        assert process.stdout.readline() == "ready\n"
    for process in asking:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate()[1] for process in asking] == ["", ""]
    assert os.listdir(tmp_path / "new") == []
