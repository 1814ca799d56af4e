"""The training data manifest on real files, good and bad."""

import cProfile
import json
import os
import pickle
import pstats
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from paths import ROOT
from pictures import cut, mask, picture
from PIL import Image

from cat_diffusion.cat_core import preprocess
from cat_diffusion.cat_core.data import manifest, masks
from cat_diffusion.cat_core.data.manifest import ManifestError, Record
from cat_diffusion.cat_core.data.masks import SampleError
from cat_diffusion.cat_core.data.tally import Tally

WHOLE = Record(
    "1",
    "a/1.jpg",
    mask="m/1.png",
    box=(0.1, 0.2, 0.6, 0.9),
    label="Bus",
    caption="a red bus in the rain",
    split="validation",
)
LINE = {"id": "x", "image": "x.png", "mask": "x_mask.png", "label": "cup"}


def lines(path, *objects):
    path.write_text("".join(json.dumps(item) + "\n" for item in objects))
    return path


# Reading and writing ------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path):
    records = [
        WHOLE,
        Record("2", "2.png", "m.png", label="cup"),
        Record("3", "3.png", box=(0, 0, 1, 1), label="Tür\u2028門"),
        Record("4", "4.png", caption="hole-free"),
        Record("5", "odd\udcff name.png", label="bytes that are no UTF-8"),
    ]
    assert manifest.write(tmp_path / "new/m.jsonl", iter(records)) == 5
    assert manifest.read(tmp_path / "new/m.jsonl") == records
    assert manifest.read(tmp_path / "new/m.jsonl", "validation") == [WHOLE]
    assert manifest.read(tmp_path / "new/m.jsonl", "test") == []
    assert os.listdir(tmp_path / "new") == ["m.jsonl"]
    assert [record.hole for record in records] == [True, True, True, False, False]


def test_the_documented_example_is_a_record():
    documented = manifest.__doc__
    text = documented[documented.index("{") : documented.index("}") + 1]
    record = manifest.parse(text.encode())
    assert record.box == (0.1, 0.2, 0.6, 0.9)
    assert record.split == "train"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"id": 3}, ["id is 3", "expected a string"]),
        ({"id": ""}, ["id is ''"]),
        ({"id": None}, ["id is None"]),
        ({"label": "  "}, ["label is '  '", "not empty"]),
        ({"label": None}, ["label is missing"]),
        ({"label": None, "mask": None}, ["nothing describes the image", "caption or a label"]),
        ({"area": 0.5}, ["unknown key 'area'", "id, image, mask, box, label, caption, split"]),
        ({"split": "val"}, ["split is 'val'", "train, validation or test"]),
        ({"split": ["train"]}, ["split is ['train']"]),
        ({"box": [0.1, 0.2, 0.1, 0.4]}, ["box is", "x0 < x1"]),
        ({"box": [0.1, 0.2, 0.5]}, ["box is"]),
        ({"box": [0, 0, 40, 30]}, ["box is", "fractions"]),
        ({"box": [0, 0, True, 1]}, ["box is"]),
        ({"box": [0, 0, float("nan"), 1]}, ["box is"]),
        ({"box": "0 0 1 1"}, ["box is '0 0 1 1'"]),
        (
            {"image": "../secret.png"},
            ["image is '../secret.png'", "stays in the manifest's folder"],
        ),
        ({"image": "a/../../secret.png"}, ["stays in"]),
        ({"image": "/etc/passwd"}, ["stays in"]),
        ({"image": "C:/secret.png"}, ["stays in"]),
        ({"mask": "a\\b.png"}, ["mask is", "forward slashes"]),
        ({"mask": "a\0.png"}, ["stays in"]),
    ],
)
def test_malformed_records_are_named_with_file_and_line(tmp_path, change, words):
    path = lines(tmp_path / "m.jsonl", LINE, {**LINE, "id": "y", **change})
    with pytest.raises(ManifestError) as error:
        manifest.read(path)
    for word in [f"{path}, line 2: ", *words, "Correct the line"]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[1, 2]",
        b"null",
        b'{"image": "x.png"}',
        b'{"id": "\xff", "image": "x"}',
        b"[" * 100_000,
        b'{"id": ' + b"9" * 100_000 + b"}",
        json.dumps(LINE).encode()[:-9],
    ],
)
def test_lines_that_are_no_record(tmp_path, line):
    path = tmp_path / "m.jsonl"
    path.write_bytes(json.dumps(LINE).encode() + b"\n" + line + b"\n")
    with pytest.raises(ManifestError, match=r"m.jsonl, line 2: .*expected") as error:
        manifest.read(path)
    assert len(str(error.value)) < 500


def test_other_splits_are_checked_too_and_ids_are_unique(tmp_path):
    path = lines(tmp_path / "m.jsonl", LINE, {**LINE, "split": "test"})
    with pytest.raises(ManifestError, match="line 2: id 'x' was used before"):
        manifest.read(path, "train")
    with pytest.raises(ManifestError, match="split is 'val'"):
        manifest.read(path, "val")
    with pytest.raises(ManifestError, match=r"none.jsonl cannot be read .*prepare_data.py"):
        manifest.read(tmp_path / "none.jsonl")


def test_a_failed_write_keeps_the_old_manifest(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("precious")
    with pytest.raises(ManifestError, match="id '1' is used twice"):
        manifest.write(path, [WHOLE, WHOLE])

    def broken():
        yield WHOLE
        raise OSError(28, "No space left on device")

    with pytest.raises(ManifestError, match=r"Cannot write .*No space left.*Check free space"):
        manifest.write(path, broken())
    assert path.read_text() == "precious"
    assert os.listdir(tmp_path) == ["m.jsonl"]
    manifest.write(path, [WHOLE])
    assert manifest.read(path) == [WHOLE]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_writer_leaves_the_old_manifest(tmp_path):
    path = tmp_path / "m.jsonl"
    manifest.write(path, [WHOLE])
    code = """
import sys, time
import comfyui
from cat_diffusion.cat_core.data import manifest
def records():
    for i in range(10**9):
        if i == 50_000:
            print("half", flush=True)
            time.sleep(60)
        yield manifest.Record(str(i), "x.png", label="cup")
manifest.write(sys.argv[1], records())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, path], cwd=ROOT / "tools", stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert manifest.read(path) == [WHOLE]
    assert len(os.listdir(tmp_path)) == 2  # and its own scrap


def test_reading_is_linear_and_compact(tmp_path):
    def record(i):
        name = f"{i:016x}"
        return Record(
            f"{name}_8ae41a6b",
            f"train/{name}.jpg",
            mask=f"masks/{name[-1]}/{name}_m01bjv_8ae41a6b.png",
            box=(0.1 + i * 1e-7, 0.2, 0.6, 0.9),
            label=f"class {i % 300}",
        )

    calls = {}  # of functions, a record
    for count in (1_000, 10_000):
        path = tmp_path / f"{count}.jsonl"
        manifest.write(path, map(record, range(count)))
        profile = cProfile.Profile()
        assert len(profile.runcall(manifest.read, path)) == count
        calls[count] = pstats.Stats(profile).total_calls / count
    assert calls[10_000] < 1.1 * calls[1_000]
    tracemalloc.start()
    records = manifest.read(path)
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"{size / count:.0f} bytes a record")
    assert size / count < 700  # 3 million records fit into 2.1 GB
    assert peak < 1.3 * size  # nothing but the ids is held besides the records
    assert not hasattr(records[0], "__dict__")
    assert records[0].label is records[300].label


def test_records_and_errors_travel_between_processes():
    assert pickle.loads(pickle.dumps(WHOLE)) == WHOLE
    error = pickle.loads(pickle.dumps(SampleError("empty mask", "x")))
    assert error.reason == "empty mask"
    assert error.detail == "x"
    assert str(error) == "empty mask: x"


# Pictures -----------------------------------------------------------------------------------------


def load(folder, **fields):
    """Picture and hole of a cup in x.jpg, but for other fields."""
    return masks.load(Record(**{"id": "x", "image": "x.jpg", "label": "cup", **fields}), folder)


def reason(folder, **fields):
    with pytest.raises(SampleError) as error:
        load(folder, **fields)
    return error.value.reason


def test_load(tmp_path):
    picture(tmp_path / "x.jpg", colour="red")
    picture(tmp_path / "grey.png", colour=100, mode="L")
    mask(tmp_path / "m.png", mode="1")
    mask(tmp_path / "large.png", (80, 60), (20, 10, 60, 40))
    image, hole = load(tmp_path, mask="m.png")
    assert image.mode == "RGB"
    assert image.size == (40, 30)
    assert hole.mode == "L"
    assert hole.size == (40, 30)
    assert hole.getbbox() == (10, 5, 30, 20)

    image, hole = load(tmp_path, image="grey.png", mask="large.png")
    assert image.getpixel((0, 0)) == (100, 100, 100)
    assert hole.size == (40, 30)
    assert hole.point(masks.BINARY).getbbox() == (10, 5, 30, 20)

    _, hole = load(tmp_path, box=(0.25, 0.5, 0.76, 1))
    assert hole.getbbox() == (10, 15, 30, 30)
    assert hole.getextrema() == (0, 255)

    _, hole = load(tmp_path, label=None, caption="a cup")
    assert hole is None


def test_load_turns_photographs_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (40, 30)).save(tmp_path / "x.jpg", exif=exif)
    mask(tmp_path / "m.png", (30, 40), (0, 0, 10, 40))
    image, hole = load(tmp_path, mask="m.png")
    assert image.size == (30, 40)
    assert hole.size == (30, 40)
    assert hole.getbbox() == (0, 0, 10, 40)


def test_load_says_why_not(tmp_path):
    assert reason(tmp_path) == "missing image"
    (tmp_path / "folder.jpg").mkdir()
    assert reason(tmp_path, image="folder.jpg") == "missing image"
    picture(tmp_path / "x.jpg")
    for name, content in (("empty.jpg", b""), ("page.jpg", b"<html>404</html>")):
        (tmp_path / name).write_bytes(content)
        assert reason(tmp_path, image=name) == "corrupt image"
    for name in ("cut.jpg", "cut.png"):
        Image.effect_noise((64, 64), 90).save(tmp_path / name)
        cut(tmp_path / name, 0.6)
        assert reason(tmp_path, image=name) == "corrupt image"
    assert reason(tmp_path, mask="none.png") == "missing mask"
    assert reason(tmp_path, mask="cut.png") == "corrupt mask"
    mask(tmp_path / "black.png", box=None)
    assert reason(tmp_path, mask="black.png") == "empty mask"
    picture(tmp_path / "ones.png", colour=1, mode="L")  # 0 and 1 instead of 0 and 255
    assert reason(tmp_path, mask="ones.png") == "mask reaches 1 of 255, expected 0 and 255"
    assert reason(tmp_path, box=(0.5, 0.5, 0.501, 0.501)) == "empty mask"  # less than a pixel


def test_holes_have_the_size_that_preprocessing_wants():
    assert masks.HOLE_SIZE == preprocess.SIZE


@pytest.mark.parametrize("variant", masks.VARIANTS)
def test_an_object_that_vanishes_at_the_training_size_is_a_bad_sample(variant):
    dot = Image.new("L", (4000, 3000))
    dot.putpixel((2000, 1500), 255)
    with pytest.raises(SampleError, match=r"empty mask: it reaches .* too small"):
        masks.training_mask(dot, variant)


@pytest.mark.parametrize(
    "box, left, top, right, bottom",  # the last two are the first pixels outside
    [
        ((0.234375, 0.285417, 0.765625, 0.55), 120, 146, 393, 282),
        ((0.5, 0.25, 1.0, 1.0), 256, 128, 512, 512),
        ((0.1, 0.2, 0.1001, 0.9), 51, 102, 52, 461),
    ],
)
def test_the_official_box_is_drawn_at_512_with_both_edges(box, left, top, right, bottom):
    """Numbers of cv2.rectangle 5.0.0, which drew the same 2,000 random boxes bit for bit."""
    raster = np.zeros((512, 512), np.uint8)
    raster[top:bottom, left:right] = 255
    object_mask = masks.box_mask(box, (640, 427)).point(lambda level: level and 255)
    record = Record("1", "x.png", box=box, label="bus")
    hole = masks.cut_hole(record, object_mask, "official-box")
    assert hole.mode == "L"
    assert np.array_equal(np.asarray(hole), raster)


def test_the_official_box_needs_the_annotations_box():
    record = Record("1", "x.png", mask="m.png", label="bus")
    full = Image.new("L", (64, 64), 255)
    with pytest.raises(SampleError, match=r"no box: .*record has none.* or take box"):
        masks.cut_hole(record, full, "official-box")
    for kind in masks.VARIANTS:
        assert masks.cut_hole(record, full, kind) == masks.training_mask(full, kind)


def test_a_tally_counts_and_keeps_few_examples():
    tally = Tally()
    for i in range(1000):
        tally.skip("corrupt image", f"id{i}")
    tally.skip("missing mask", "a\nb\x1b[2J")
    tally.keep()
    assert tally.skipped == {"corrupt image": 1000, "missing mask": 1}
    assert len(tally.examples["corrupt image"]) == 20
    head, corrupt, missing = str(tally).splitlines()
    assert head == "1,002 samples: 1 kept, 1,001 skipped"
    assert corrupt.startswith("  corrupt image: 1,000 (id0, ")
    assert corrupt.endswith("id19, and 980 more)")
    assert "id20" not in corrupt
    assert missing == r"  missing mask: 1 ('a\nb\x1b[2J')"
