"""CAT Sample Photo: it needs no file of the user's, and takes theirs as Load Image does."""

import folder_paths
import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image

from cat_diffusion.nodes import sample_photo
from cat_diffusion.nodes.sample_photo import SAMPLE, CATSamplePhoto

MASK = ROOT / "web/photograph/mask.png"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Folders of one's own for the host."""
    for kind in ("input", "temp"):
        (tmp_path / kind).mkdir()
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path / "temp"))
    return tmp_path


def test_the_sample_is_laid_out_again_where_the_host_has_emptied_its_folder(folders):
    assert CATSamplePhoto.validate_inputs(SAMPLE) is True
    image, mask = CATSamplePhoto.execute(SAMPLE).result
    stored = np.asarray(Image.open(MASK).convert("L")) / 255
    assert image.shape == (1, 512, 512, 3)
    assert torch.allclose(mask[0].double(), torch.from_numpy(stored), atol=1e-3)
    assert list((folders / "input").iterdir()) == []


def test_a_picture_that_the_mask_editor_saves_takes_its_place(folders):
    painted = sample_photo.sample_picture()
    painted.putalpha(0)
    painted.save(folders / "input/painted.png")
    name = "painted.png [input]"
    assert CATSamplePhoto.validate_inputs(name) is True
    _, mask = CATSamplePhoto.execute(name).result
    assert (mask == 1).all()
    before = CATSamplePhoto.fingerprint_inputs(name)
    painted.resize((64, 64)).save(folders / "input/painted.png")
    assert CATSamplePhoto.fingerprint_inputs(name) != before


@pytest.mark.parametrize("name", ["gone.png", "", 3, "a\0b", "\ud800.png"])
def test_what_is_no_picture_is_named(name):
    refusal = CATSamplePhoto.validate_inputs(name)
    assert isinstance(refusal, str)
    with pytest.raises(ValueError):
        CATSamplePhoto.execute(name)


def test_a_picture_outside_the_hosts_folders_is_not_read(folders):
    outside = folders / "outside.png"
    sample_photo.sample_picture().save(outside)
    for name in (str(outside), "../outside.png", "../outside.png [temp]"):
        assert isinstance(CATSamplePhoto.validate_inputs(name), str)
        with pytest.raises(ValueError, match="There is no picture"):
            CATSamplePhoto.execute(name)


def test_a_file_that_is_no_picture_is_named(folders):
    (folders / "input/text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png cannot be read as a picture"):
        CATSamplePhoto.execute("text.png")
