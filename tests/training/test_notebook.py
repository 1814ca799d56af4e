"""The notebook, executed from its first cell to its last on a tiny model, and once more."""

import json
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from paths import ROOT
from PIL import Image, ImageDraw

from cat_diffusion.cat_core import weights

pytest.importorskip("accelerate")
NOTEBOOK = ROOT / "notebooks/train_cat.ipynb"
STAGES = ("sem-inpainter", "ref-adapter-unet")


@pytest.fixture
def pictures(tmp_path):
    """A folder as the notebook describes it, with twenty pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(20):
        noise = np.random.default_rng(number).integers(0, 255, (40, 48, 3), np.uint8)
        mask = Image.new("L", (96, 80))
        ImageDraw.Draw(mask).ellipse((10 + number, 10, 40 + number, 50), fill=255)
        Image.fromarray(noise).resize((96, 80)).save(folder / f"{number}.jpg")
        mask.save(folder / f"{number}_mask.png")
        (folder / f"{number}.txt").write_text(("spoon", "cup")[number % 2])
    return folder


def execute(parameters: dict, folder: Path) -> str:
    """Run a copy of the notebook with other parameters; returns what its cells printed."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (chosen,) = [
        place
        for place, cell in enumerate(notebook.cells)
        if "parameters" in cell.metadata.get("tags", [])
    ]
    lines = [f"{name} = {value!r}" for name, value in parameters.items()]
    notebook.cells.insert(chosen + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute()
    printed = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            printed.append(output.get("text", ""))
    return "".join(printed)


def test_from_a_folder_to_a_checkpoint_and_on_again(tiny_file, pictures, tmp_path):
    storage = tmp_path / "storage"
    parameters = {
        "STORAGE": str(storage),
        "PRESET": None,
        "PICTURES": str(pictures),
        "STEPS": (2, 2),
        "BASE": [str(tiny_file)],
        "MORE": ["--cpu", "--size", "64", "--batch-size", "2", "--micro-batch-size", "2"],
        "LICENCE": "CC0",
    }
    parameters["MORE"] += ["--save-every", "1", "--dataloader-num-workers", "0"]
    printed = execute(parameters, ROOT / "notebooks")
    file = weights.read(storage / "my_cat.safetensors")
    file.require(*weights.PREFIXES)
    assert file.metadata["license"] == "CC0"
    assert "samples/s" in printed or "samples a second" in printed  # the plan
    for stage in STAGES:
        assert (storage / stage / "validation.csv").is_file()
        assert json.loads((storage / stage / "best.json").read_text())["step"] in (1, 2)

    # A machine that comes back finds everything done, but for two more steps of the second stage.
    logs = {stage: (storage / stage / "log.csv").read_text() for stage in STAGES}
    execute({**parameters, "STEPS": (2, 4)}, ROOT / "notebooks")
    assert (storage / STAGES[0] / "log.csv").read_text() == logs[STAGES[0]]
    after = (storage / STAGES[1] / "log.csv").read_text()
    assert after.startswith(logs[STAGES[1]])
    assert len(after.splitlines()) == 5


def test_it_is_kept_without_results():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
