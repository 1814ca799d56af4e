"""What several tests of training work on."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cat_diffusion.cat_core.data import manifest


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A manifest of 20 small pictures with masks or boxes, one corrupt and one without a hole."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for i in range(20):
        rng = np.random.default_rng(i)
        picture = Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)).resize((96, 80))
        mask = Image.new("L", (96, 80))
        ImageDraw.Draw(mask).ellipse((10 + i, 10, 40 + i, 50), fill=255)
        picture.save(folder / f"{i}.png")
        mask.save(folder / f"{i}_mask.png")
        where = {"mask": f"{i}_mask.png"} if i % 3 else {"box": (0.1, 0.2, 0.5, 0.7)}
        records.append(manifest.Record(f"s{i}", f"{i}.png", label=("spoon", "cup")[i % 2], **where))
    (folder / "7.png").write_bytes((folder / "7.png").read_bytes()[:100])
    picture.save(folder / "free.png")
    records.append(manifest.Record("free", "free.png", caption="an empty table"))
    manifest.write(folder / "manifest.jsonl", records)
    return folder / "manifest.jsonl"
