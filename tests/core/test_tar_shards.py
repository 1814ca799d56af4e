"""Tar shards: written by tools/prepare_data.py, read by it and by training, whole and cut short."""

import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from paths import ROOT
from pictures import mask, picture

from cat_diffusion.cat_core.data import manifest, masks, members
from cat_diffusion.cat_core.training import identity, shard_file

pytestmark = pytest.mark.slow

NAMES = ("cup", "fork", "spoon")


def prepare(source, *arguments, code=0):
    command = [sys.executable, ROOT / "tools/prepare_data.py", source, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == code, run.stdout + run.stderr
    assert "Traceback" not in run.stderr
    return run


@pytest.fixture
def data(tmp_path):
    """A folder of three triples."""
    for number, name in enumerate(NAMES):
        picture(tmp_path / f"data/{name}_image.png", colour=(50 * number, 9, 9))
        mask(tmp_path / f"data/{name}_mask.png", box=(10, 5, 30 - number, 20))
    return tmp_path / "data"


@pytest.fixture
def shards(data):
    """The same in two shards, the first of which holds two."""
    out = data.parent / "m.jsonl"
    size = 2500 / 1e6  # MB: smaller than the blocks of one sample, larger than two heads
    prepare("folder", "--data", data, "--out", out, "--shards", size, "--check")
    return out


def pixels(record, folder):
    image, hole = masks.load(record, folder)
    return np.dstack([np.asarray(image), np.asarray(hole)])


def test_files_are_copied_into_shards_and_read_from_there(data, shards):
    plain = data.parent / "plain.jsonl"
    prepare("folder", "--data", data, "--out", plain)
    expected = [pixels(record, data.parent) for record in manifest.read(plain)]
    for path in data.iterdir():
        path.unlink()
    records = manifest.read(shards)
    assert [record.label for record in records] == list(NAMES)
    assert [record.id for record in records] == [f"{name}_image" for name in NAMES]
    for record, values in zip(records, expected, strict=True):
        assert np.array_equal(pixels(record, data.parent), values)
    tars = sorted(path.name for path in data.parent.glob("*.tar"))
    assert tars == sorted({record.image.split("/")[0] for record in records})
    assert len(tars) == 3
    with tarfile.open(data.parent / tars[0]) as tar:
        assert tar.getnames() == ["000000000.png", "000000000.mask.png", "000000000.json"]
    run = prepare("folder", "--data", data, "--out", shards, "--shards", code=1)
    assert "exists already" in run.stderr


def test_shards_are_found_again_and_webdataset_reads_them(shards, tmp_path):
    tars = sorted(tmp_path.glob("*.tar"))
    again = tmp_path / "again.jsonl"
    prepare("webdataset", "--shard", *tars, "--out", again, "--check")
    assert manifest.read(again) == manifest.read(shards)
    webdataset = pytest.importorskip("webdataset", reason="requirements-train.txt")
    samples = list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False))
    assert [json.loads(sample["json"])["label"] for sample in samples] == list(NAMES)
    assert all(sample["png"] and sample["mask.png"] for sample in samples)


def test_shards_come_by_pipes_and_patterns(shards, tmp_path):
    pytest.importorskip("webdataset", reason="requirements-train.txt")
    pattern = f"pipe:cat {tmp_path}/m-{{000000..000002}}.tar"
    out = tmp_path / "copy/m.jsonl"
    prepare("webdataset", "--shard", pattern, "--out", out)
    copied = manifest.read(out)
    assert [record.label for record in copied] == list(NAMES)
    for record, original in zip(copied, manifest.read(shards), strict=True):
        assert record.image.startswith("shards/m-00000")
        assert np.array_equal(pixels(record, out.parent), pixels(original, tmp_path))
    run = prepare("webdataset", "--shard", "pipe:exit 3", "--out", tmp_path / "x.jsonl", code=1)
    assert "pipe:exit 3 cannot be read" in run.stderr


def test_shards_from_elsewhere(tmp_path):
    """A picture with a text and no more, one with a box, and what is no sample."""
    picture(tmp_path / "p.jpg")
    files = {
        "a/1.txt": b"a harbour at night",
        "a/2.json": json.dumps({"label": "cup", "box": [0.1, 0.2, 0.5, 0.9]}).encode(),
        "a/3.json": b"[]",
        "a/4.txt": b"\xff",
    }
    with tarfile.open(tmp_path / "e.tar", "w") as tar:
        for name, content in files.items():
            (tmp_path / "said").write_bytes(content)
            tar.add(tmp_path / "p.jpg", f"{name.split('.')[0]}.jpg")
            tar.add(tmp_path / "said", name)
        tar.add(tmp_path / "said", "a/5.txt")
    prepare("webdataset", "--shard", tmp_path / "e.tar", "--out", tmp_path / "m.jsonl", "--check")
    harbour, cup = manifest.read(tmp_path / "m.jsonl")
    assert (harbour.id, harbour.caption, harbour.hole) == ("e_a/1", "a harbour at night", False)
    assert (cup.label, cup.box) == ("cup", (0.1, 0.2, 0.5, 0.9))
    report = (tmp_path / "m.jsonl.report.txt").read_text()
    assert "malformed sample: 2 (e_a/3, e_a/4)" in report
    assert "no picture: 1 (e_a/5)" in report


@pytest.mark.parametrize("size, samples", [(1000, 0), (5000, 1), (6700, 2)])
def test_a_shard_cut_short_is_said(data, tmp_path, size, samples):
    """A sample takes six blocks of 512 bytes here."""
    out = tmp_path / "m.jsonl"
    prepare("folder", "--data", data, "--out", out, "--shards")
    whole = manifest.read(out)
    tar = tmp_path / "m-000000.tar"
    tar.write_bytes(tar.read_bytes()[:size])
    again = tmp_path / "again.jsonl"
    run = prepare("webdataset", "--shard", tar, "--out", again, code=int(not samples))
    assert "shard cut short: 1 (m-000000.tar)" in run.stdout
    assert "fetch or copy it again" in run.stdout
    assert (manifest.read(again) if samples else []) == whole[:samples]
    with pytest.raises(masks.SampleError, match=r"shard cut short: .*m-000000.tar ends .* early"):
        masks.load(whole[2], tmp_path)


def test_a_cache_knows_the_files_in_a_shard(shards, tmp_path):
    path = tmp_path / manifest.read(shards)[0].image
    size = identity.size_of(path)
    stamp = shard_file.stamp(path)
    assert stamp[0] == size > 0
    assert stamp[2] == identity.of_file(path)
    place = members.place_of(path)
    os.utime(place.tar)
    assert not shard_file.has_changed(path, stamp)
    content = bytearray(place.tar.read_bytes())
    content[place.start + 20] ^= 1
    place.tar.write_bytes(content)
    assert shard_file.has_changed(path, stamp)
