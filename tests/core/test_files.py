"""Files and folders that are whole or not there."""

import os

import pytest

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
    with pytest.raises(Full), files.replacing_folder(path) as left:
        (left / "half").touch()
        left.rename(tmp_path / "kept")
        raise Full
    (tmp_path / "kept").rename(left)  # as if nobody had cleaned up
    with files.replacing_folder(path) as partial:
        assert names(partial) == []
        (partial / "new").touch()
    assert names(path) == ["new"]
    assert names(tmp_path) == ["x"]


def test_texts_are_utf_8_with_plain_line_ends(tmp_path):
    files.write_text(tmp_path / "x.txt", "猫\n")
    assert (tmp_path / "x.txt").read_bytes() == "猫\n".encode()
