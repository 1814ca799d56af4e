"""Which files of models/cat_diffusion the loaders open."""

import folder_paths
import pytest

from cat_diffusion.nodes.host import model_files
from cat_diffusion.nodes.load import CATLoadCheckpoint, CATLoadWeights

WHAT = "a CAT weights file"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The host's folder for CAT files, with a link to elsewhere, and a private file beside it."""
    (tmp_path / "models").mkdir()
    extensions = set(model_files.EXTENSIONS)
    place = ([str(tmp_path / "models")], extensions)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, model_files.FOLDER, place)
    (tmp_path / "private.txt").write_text("secret words")
    return tmp_path / "models"


@pytest.mark.parametrize("name", ["notes.txt", "token", "x.safetensors.bak", "x.json", "x.pt"])
def test_only_endings_of_weights_are_opened(folder, name):
    (folder / name).write_text("secret words")
    for node in (CATLoadCheckpoint, CATLoadWeights):
        message = node.validate_inputs(name)
        assert f"'{name}' ends neither in .safetensors nor in .ckpt. Choose" in message
        with pytest.raises(ValueError, match="ends neither in") as error:
            node.execute(name)
        assert "secret" not in str(error.value)
        with pytest.raises(ValueError, match="ends neither in"):
            node.fingerprint_inputs(name)


def test_a_link_to_another_kind_of_file_is_not_opened(folder):
    (folder / "x.safetensors").symlink_to(folder.parent / "private.txt")
    message = CATLoadWeights.validate_inputs("x.safetensors")
    assert "'x.safetensors' links to a file that ends neither in" in message
    with pytest.raises(ValueError, match="links to a file") as error:
        CATLoadWeights.execute("x.safetensors")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("target", ["elsewhere.safetensors", "ELSEWHERE.SAFETENSORS", "0f3a9b"])
def test_links_to_weights_are_opened(folder, tiny_file, target):
    (folder.parent / target).write_bytes(tiny_file.read_bytes())
    (folder / "x.safetensors").symlink_to(folder.parent / target)
    assert model_files.missing_file("x.safetensors", WHAT) is None
    assert set(model_files.read("x.safetensors").parts) >= {"sem_inpainter", "ref_adapter"}


def test_content_that_is_no_weights_is_not_quoted(folder):
    (folder / "x.safetensors").write_text("secret words")
    with pytest.raises(ValueError, match=r"x\.safetensors is not a weights file") as error:
        CATLoadWeights.execute("x.safetensors")
    assert "secret" not in str(error.value)
