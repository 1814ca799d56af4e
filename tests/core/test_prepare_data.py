"""tools/prepare_data.py on every kind of source, good and bad, as a user runs it."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from paths import ROOT
from pictures import cut, mask, picture
from PIL import Image

from cat_diffusion.cat_core.data import chosen, manifest, masks
from cat_diffusion.cat_core.data.folder import PICTURES
from cat_diffusion.cat_core.data.manifest import Record
from comfyui import existing

pytestmark = pytest.mark.slow


def prepare(source, *arguments, **environment):
    run = subprocess.run(
        [sys.executable, ROOT / "tools/prepare_data.py", source, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert "Traceback" not in run.stderr, run.stderr
    return run


def skipped(out):
    """Reasons and counts from the report beside a manifest."""
    _, *lines = out.with_name(f"{out.name}.report.txt").read_text().splitlines()
    counts = {}
    for line in lines:
        reason, count = line.strip().split(" (")[0].rsplit(": ", 1)
        counts[reason] = int(count)
    return counts


def hole_of(record, folder):
    _, hole = masks.load(record, folder)
    return hole


@pytest.fixture
def triples(tmp_path):
    """A folder with three good triples and one of every kind of bad one."""
    data = tmp_path / "data"
    picture(data / "fire_hydrant_image.jpg")
    for stem in ["cup", "gas_mask", "no_label", "blank", "bare", "broken", "latin", "black"]:
        picture(data / f"{stem}.jpg")
    for stem in ["fire_hydrant", "cup", "gas_mask", "no_label", "blank", "broken", "lost", "latin"]:
        mask(data / f"{stem}_mask.png")
    mask(data / "black_mask.png", box=None)
    cut(data / "broken.jpg")
    for stem in ["cup", "gas_mask", "bare", "broken", "black"]:
        (data / f"{stem}.txt").write_text(f" a  {stem}\n")
    (data / "blank.txt").write_text(" \n")
    (data / "latin.txt").write_bytes(b"caf\xe9")
    return data


def test_folder(triples):
    out = triples / "m.jsonl"
    run = prepare("folder", "--data", triples, "--out", out, "--split", "validation")
    assert run.returncode == 0, run.stderr
    records = {record.id: record for record in manifest.read(out, "validation")}
    exist = {"broken", "black"}  # and are no more looked at
    assert set(records) == {"fire_hydrant_image", "cup", "gas_mask"} | exist
    assert records["fire_hydrant_image"] == Record(
        "fire_hydrant_image",
        "fire_hydrant_image.jpg",
        "fire_hydrant_mask.png",
        label="fire hydrant",
        split="validation",
    )
    assert records["gas_mask"].mask == "gas_mask_mask.png"
    assert records["cup"].label == "a cup"
    assert skipped(out) == {
        "missing label": 1,
        "empty label": 1,
        "missing mask": 1,
        "unreadable label": 1,
        "missing image": 1,
    }
    assert "10 samples: 5 kept, 5 skipped" in run.stdout
    for record in (records["cup"], records["fire_hydrant_image"]):
        assert hole_of(record, triples).getbbox() == (10, 5, 30, 20)


def test_check_decodes_everything(triples):
    out = triples.parent / "m.jsonl"
    assert prepare("folder", "--data", triples, "--out", out, "--check").returncode == 0
    records = manifest.read(out)
    assert {record.id for record in records} == {"fire_hydrant_image", "cup", "gas_mask"}
    for record in records:
        assert record.image.startswith("data/")
    assert skipped(out)["corrupt image"] == 1
    assert skipped(out)["empty mask"] == 1


def test_a_folder_may_hold_every_format_that_is_read(tmp_path):
    names = [f"cup{number}{ending}" for number, ending in enumerate(PICTURES)]
    names.append("LOUD.TIF")
    for name in names:
        stem = name.split(".")[0]
        picture(tmp_path / name)
        mask(tmp_path / f"{stem}_mask.gif")
        (tmp_path / f"{stem}.txt").write_text("cup")
    picture(tmp_path / "cup0.gif")  # the first format counts
    (tmp_path / "phone.heic").write_bytes(b"x")
    mask(tmp_path / "phone_mask.png")
    (tmp_path / "labelled.heic").write_bytes(b"x")
    (tmp_path / "labelled.txt").write_text("cup")
    (tmp_path / "cup1.json").write_text("{}")
    out = tmp_path / "m.jsonl"
    run = prepare("folder", "--data", tmp_path, "--out", out, "--check")
    assert run.returncode == 0, run.stderr
    records = manifest.read(out)
    assert {record.image for record in records} == set(names)
    for record in records:
        image, hole = masks.load(record, tmp_path)
        assert hole.getbbox() == (10, 5, 30, 20)
        red, *others = image.getpixel((20, 15))
        assert red > 240
        assert max(others) < 12
    assert skipped(out) == {
        "same name with another ending": 1,
        ".heic is no format that is read": 2,
    }


def test_nothing_is_overwritten_unless_told(triples):
    out = triples / "m.jsonl"
    out.write_text("precious")
    run = prepare("folder", "--data", triples, "--out", out)
    assert run.returncode == 1
    assert "exists already" in run.stderr
    assert out.read_text() == "precious"
    assert prepare("folder", "--data", triples, "--out", out, "--overwrite").returncode == 0
    assert len(manifest.read(out)) == 5
    before = out.read_text()
    for path in triples.glob("*_mask.png"):
        path.unlink()
    run = prepare("folder", "--data", triples, "--out", out, "--overwrite")
    assert run.returncode == 1
    assert "no usable sample in folder" in run.stderr
    assert out.read_text() == before
    assert not list(triples.glob("*.partial"))


def test_the_manifest_lies_above_the_data(triples, tmp_path):
    out = tmp_path / "elsewhere/m.jsonl"
    run = prepare("folder", "--data", triples, "--out", out)
    assert run.returncode == 1
    assert "lies outside" in run.stderr
    assert f"--out {tmp_path / 'm.jsonl'}" in run.stderr
    assert not out.parent.exists()
    out.parent.mkdir()
    (out.parent / "linked").symlink_to(triples)
    assert prepare("folder", "--data", out.parent / "linked", "--out", out).returncode == 0
    image, _ = masks.load(manifest.read(out)[-1], out.parent)
    assert image.size == (40, 30)
    run = prepare("folder", "--data", tmp_path / "none", "--out", tmp_path / "m.jsonl")
    assert run.returncode == 1
    assert "is not a folder" in run.stderr


def test_official_lists(tmp_path):
    good = {
        "mask_image": "masks/0.png",
        "label": "Bus",
        "box_id": "8a",
        "area": 0.42109375000000004,
        "image_id": "61",
        "box": [0.234375, 0.285417, 0.765625, 0.55],
        "image": "data/61.jpg",
    }  # numbers of the official example
    picture(tmp_path / "all/data/61.jpg")
    mask(tmp_path / "all/masks/0.png")
    marker = tmp_path / "ran"
    changes = [
        {},
        {"box_id": "b", "label": " "},
        {"box_id": "c", "mask_image": "no.png"},
        {"box_id": "d", "image": "no.jpg"},
        {},
        {"box_id": "e", "box": [0.5, 0.5, 0, 0.1]},
        {"box_id": "f", "image": "../../secret.jpg"},
        {"box_id": "g", "box": [0.5, 0.5, 0.1, 0.1]},
    ]
    items = [
        *(repr(good | change) for change in changes),
        repr({"image_name": "data/61.jpg", "text": "a harbour at night"}),
    ]
    hostile = [
        f"__import__('os').system('touch {marker}')",
        f"{{'image': open({str(marker)!r}, 'w')}}",
        "",
        "{",
        "5",
        "'image_name'",
        "{'image': 'x'}",
        repr({**good, "box": [float("inf"), 0, 1, 1]}),
        repr({**good, "label": None}),
        repr({**good, "box": ["0", "0", "1", "1"]}),
        repr({**good, "box": [1, 1, 40, 30]}),
        "[" * 5000,
        "-" * 9000 + "1",
        "9" * 9000,
        "{'a': '\\N{x}'}",
        "x" * 20_000,
        "\0",
        repr({**good, "image": 5, "box": {}}),
        "laion/00000001.tar",
    ]
    (tmp_path / "list.txt").write_text("\n".join([*items, *hostile]) + "\n")
    out = tmp_path / "m.jsonl"
    run = prepare(
        "official",
        "--list",
        tmp_path / "list.txt",
        "--images",
        tmp_path / "all",
        "--masks",
        tmp_path / "all",
        "--out",
        out,
        "--min-area",
        "0.05",
    )
    assert run.returncode == 0, run.stderr
    assert not marker.exists()
    bus, harbour = manifest.read(out)
    assert bus.id == "61_8a"
    assert bus.image == "all/data/61.jpg"
    assert bus.mask == "all/masks/0.png"
    assert bus.label == "Bus"
    x, y, width, height = good["box"]
    assert width * height == pytest.approx(good["area"])  # so the last two are a size, not a corner
    assert bus.box == pytest.approx((x, y, x + width, y + height))
    assert harbour.image == "all/data/61.jpg"
    assert harbour.caption == "a harbour at night"
    assert not harbour.hole
    assert skipped(out) == {
        "malformed line": len(hostile),
        "empty label": 1,
        "missing mask": 1,
        "missing image": 1,
        "duplicate id": 1,
        "malformed sample": 2,
        "smaller than 0.05 of the image": 1,
    }


@pytest.fixture
def openimages(tmp_path):
    """CSV files as published, with good and bad rows; returns the command's arguments."""
    (tmp_path / "classes.csv").write_text('/m/01bjv,Bus\n/m/0h8n6f9,"Salt, pepper"\n/m/00,\n')
    for name in ("a0", "b1"):
        picture(tmp_path / f"train/{name}.jpg")
    mask(tmp_path / "masks/a/a0_m01bjv_1.png", mode="1")
    mask(tmp_path / "masks/B/b1_m01bjv_2.png", mode="1")
    mask(tmp_path / "more/a0_x_3.png", mode="1")
    box = "0.25,0.75,0.1,0.7,0.9,0.5 0.5 1"
    rows = [
        f"a0_m01bjv_1.png,a0,/m/01bjv,1,{box}",
        f"b1_m01bjv_2.png,b1,/m/01bjv,2,{box}",
        f"a0_x_3.png,a0,/m/0h8n6f9,3,{box}",
        f"a0_x_3.png,a0,/m/0h8n6f9,3,{box}",
        f"a0_x_3.png,a0,/m/77,4,{box}",
        f"a0_x_3.png,a0,/m/00,5,{box}",
        f"none.png,a0,/m/01bjv,6,{box}",
        f"a0_x_3.png,c2,/m/01bjv,7,{box}",
        "a0_x_3.png,a0,/m/01bjv,8,0.1,0.2,0.1,0.2,1,",
        "a0_x_3.png,a0,/m/01bjv,9,0,1,0,1,1,",
        'a0_x_3.png,a0,/m/01bjv,"10',
        "a0,b,c,d,nan,1,0,1",
        "a0,b,c,d,one,1,0,1",
        f"a0_x_3.png,../../a0,/m/01bjv,11,{box}",
        f"/etc/passwd,a0,/m/01bjv,12,{box}",
    ]
    header = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"
    (tmp_path / "seg.csv").write_text("\n".join([header, *rows]) + "\n")
    return [
        "--classes",
        tmp_path / "classes.csv",
        "--annotations",
        tmp_path / "seg.csv",
        "--images",
        tmp_path / "train",
        "--masks",
        tmp_path / "masks",
        tmp_path / "more",
        "--out",
        tmp_path / "m.jsonl",
    ]


def test_openimages(openimages, tmp_path):
    run = prepare("openimages", *openimages, "--min-area", "0.05", "--max-area", "0.5", "--check")
    assert run.returncode == 0, run.stderr
    records = manifest.read(tmp_path / "m.jsonl")
    box = (0.25, 0.1, 0.75, 0.7)
    assert [(r.id, r.image, r.mask, r.label) for r in records] == [
        ("a0_1", "train/a0.jpg", "masks/a/a0_m01bjv_1.png", "Bus"),
        ("b1_2", "train/b1.jpg", "masks/B/b1_m01bjv_2.png", "Bus"),
        ("a0_3", "train/a0.jpg", "more/a0_x_3.png", "Salt, pepper"),
    ]
    for record in records:
        assert record.box == pytest.approx(box)
    assert skipped(tmp_path / "m.jsonl") == {
        "duplicate id": 1,
        "unknown class": 1,
        "empty label": 1,
        "missing mask": 2,
        "missing image": 1,
        "malformed line": 3,
        "smaller than 0.05 of the image": 1,
        "larger than 0.5 of the image": 1,
        "malformed sample": 1,
    }


def test_openimages_wrong_files(openimages, tmp_path):
    swapped = [*openimages]
    swapped[1], swapped[3] = swapped[3], swapped[1]
    run = prepare("openimages", *swapped)
    assert run.returncode == 1
    assert "names no class" in run.stderr
    swapped[1] = openimages[1]
    run = prepare("openimages", *swapped)
    assert run.returncode == 1
    assert "has no column MaskPath" in run.stderr
    run = prepare("openimages", *openimages[:3], tmp_path / "none.csv", *openimages[4:])
    assert run.returncode == 1
    assert "is not a file" in run.stderr
    run = prepare("openimages", *openimages, "--min-area", "5")
    assert run.returncode == 2
    assert "expected 0 to 1" in run.stderr
    run = prepare("openimages", *openimages, "--min-area", "0.5", "--max-area", "0.1")
    assert run.returncode == 2
    assert "nothing would be left" in run.stderr
    assert not (tmp_path / "m.jsonl").exists()


@pytest.fixture
def instances(tmp_path):
    """COCO annotations, good and bad; returns the command's arguments."""
    picture(tmp_path / "images/1.jpg")
    square = {
        "image_id": 1,
        "category_id": 1,
        "iscrowd": 0,
        "bbox": [10, 5, 20, 15],
        "segmentation": [[10, 5, 30, 5, 30, 20, 10, 20]],
    }
    runs = [10 * 30 + 5] + [15, 15] * 19 + [15, 10 + 10 * 30]  # the same square, column by column
    bad = [
        [],
        [[1, 2, 3]],
        [[1, 2, 3, 4, 5, "x"]],
        [[1, float("nan"), 3, 4, 5, 6]],
        5,
        {"size": [30, 40], "counts": [1, 2]},
        {"size": [3, 4], "counts": [12]},
        {"size": [30, 40], "counts": "zzzzzzzz"},
        {"size": [30, 40], "counts": [9**9, 3]},
        {"size": [30, 40], "counts": None},
    ]
    changes = [
        {"id": 7},
        {"id": 8, "segmentation": {"size": [30, 40], "counts": runs}},
        {"id": 9, "iscrowd": 1},
        {"id": 10, "category_id": 2},
        {"id": 11, "image_id": 2},
        {"id": 12, "segmentation": {"size": [30, 40], "counts": [1200]}},
        {"id": 7},
        {"id": 13, "bbox": [0, 0, 1, 1]},
        {"id": 14, "image_id": 3},
        {"id": 15, "category_id": 99},
        {"id": "../../x"},
        {"id": 16, "bbox": None},
        {},
        {"id": 17, "image_id": 4},
        *({"id": 20 + i, "segmentation": item} for i, item in enumerate(bad)),
        {"id": 40, "segmentation": [[10, 5, 1e9, 5, 1e9, 20, 10, 20]]},
    ]
    annotations = [square | change for change in changes]
    content = {
        "images": [
            {"id": 1, "file_name": "1.jpg", "width": 40, "height": 30},
            {"id": 2, "file_name": "none.jpg", "width": 40, "height": 30},
            {"id": 4, "file_name": "1.jpg", "width": 40_000, "height": 0},
            {"file_name": "stray.jpg"},
            7,
        ],
        "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": " "}],
        "annotations": annotations,
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    (tmp_path / "captions.json").write_text(
        json.dumps(
            {
                "annotations": [
                    {"image_id": 1, "caption": "a cup \n on a table"},
                    {"image_id": 1, "caption": "second"},
                    {"image_id": 5},
                ]
            }
        )
    )
    return [
        "--instances",
        tmp_path / "instances.json",
        "--images",
        tmp_path / "images",
        "--out",
        tmp_path / "m.jsonl",
    ]


def pycocotools_mask():
    """pycocotools.mask; the test is skipped where it is not installed."""
    reason = "pycocotools is not installed (requirements-coco.txt)"
    return pytest.importorskip("pycocotools.mask", reason=reason)


def test_coco(instances, tmp_path):
    pycocotools_mask()
    out = tmp_path / "m.jsonl"
    run = prepare(
        "coco",
        *instances,
        "--captions",
        tmp_path / "captions.json",
        "--min-area",
        "0.05",
        "--check",
    )
    assert run.returncode == 0, run.stderr
    records = manifest.read(out)
    assert [record.id for record in records] == ["1_7", "1_8", "1_../../x", "1_20", "1_40"]
    assert records[0] == Record(
        "1_7",
        "images/1.jpg",
        mask="m_masks/017/1_7.png",
        box=records[0].box,
        label="cup",
        caption="a cup on a table",
    )
    assert records[0].box == pytest.approx((0.25, 1 / 6, 0.75, 2 / 3))
    for record in records[:2]:  # polygon and run lengths draw the same
        assert hole_of(record, tmp_path).getbbox() == (10, 5, 30, 20)
    assert re.fullmatch(r"m_masks/\w{3}/[0-9a-f]{64}\.png", records[2].mask)
    assert records[3].mask is None  # no outline: its box alone
    assert hole_of(records[3], tmp_path).getbbox() == (10, 5, 30, 20)
    cut_at_edge = hole_of(records[4], tmp_path)
    assert cut_at_edge.getbbox() == (10, 5, 40, 20)
    assert skipped(out) == {
        "malformed annotation": 11,
        "malformed annotation: no id": 1,
        "unknown image": 1,
        "unknown class": 1,
        "crowd": 1,
        "empty label": 1,
        "missing image": 1,
        "empty mask": 1,
        "duplicate id": 1,
        "smaller than 0.05 of the image": 1,
    }
    assert len(list((tmp_path / "m_masks").rglob("*"))) == 8  # no mask without a record
    run = prepare("coco", *instances[:-1], tmp_path / "m.json")
    assert run.returncode == 1
    assert "m_masks exists already" in run.stderr
    (tmp_path / "instances.json").write_text("{}")
    run = prepare("coco", *instances, "--overwrite")
    assert run.returncode == 1
    assert "is not COCO's" in run.stderr
    assert len(manifest.read(out)) == 5


def test_coco_with_other_rules(instances, tmp_path):
    """Crowds are kept, what the border cuts is not; one process finds what several find."""
    pycocotools_mask()
    content = json.loads((tmp_path / "instances.json").read_text())
    content["annotations"].append(content["annotations"][0] | {"id": 41, "bbox": [0, 5, 30, 15]})
    (tmp_path / "instances.json").write_text(json.dumps(content))
    rules = ["--keep-crowds", "--skip-truncated", "--overwrite"]
    reports = []
    for workers in (1, 3):
        prepare("coco", *instances, *rules, "--workers", workers)
        ids = [record.id for record in manifest.read(tmp_path / "m.jsonl")]
        reports.append((ids, (tmp_path / "m.jsonl.report.txt").read_text()))
    assert reports[0] == reports[1]
    assert ids == ["1_7", "1_8", "1_9", "1_../../x", "1_20", "1_40"]
    counts = skipped(tmp_path / "m.jsonl")
    assert "crowd" not in counts
    assert counts["truncated by the border of the image"] == 2


def rectangle(x, y, width, height):
    """An annotation's box and outline, in pixels."""
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {"bbox": [x, y, width, height], "segmentation": [corners]}


def write_coco(folder, images, annotations, category=1):
    """COCO's file for images of a cup; returns the command's arguments."""
    content = {
        "images": images,
        "categories": [{"id": category, "name": "cup"}],
        "annotations": [{"category_id": category, **item} for item in annotations],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    arguments = ["--instances", folder / "instances.json", "--images", folder / "images"]
    return [*arguments, "--out", folder / "m.jsonl"]


def coco_records(folder, *arguments):
    run = prepare("coco", *arguments, "--check")
    assert run.returncode == 0, run.stdout + run.stderr
    return {record.id: record for record in manifest.read(folder / "m.jsonl")}


BOXES = [(10, 5, 20, 15), (2, 3, 8, 9), (20, 10, 5, 5)]


def corners(box):
    x, y, width, height = box
    return x, y, x + width, y + height


def test_coco_ids_that_restart_in_every_image(tmp_path):
    pycocotools_mask()
    images = []
    annotations = []
    for number, box in enumerate(BOXES):
        name = f"{number}.png"
        picture(tmp_path / "images" / name)
        images.append({"id": number, "file_name": name, "width": 40, "height": 30})
        annotations.append({"id": 1, "image_id": number, **rectangle(*box)})
    records = coco_records(tmp_path, *write_coco(tmp_path, images, annotations))
    assert set(records) == {"0_1", "1_1", "2_1"}
    for number, box in enumerate(BOXES):
        assert hole_of(records[f"{number}_1"], tmp_path).getbbox() == corners(box)


def test_coco_ids_may_be_texts(tmp_path):
    """Of letters that differ in their case alone, and of what no file may be called."""
    pycocotools_mask()
    ids = ["a", "A", "../b:\u00e9" + "x" * 300]
    annotations = []
    for id, box in zip(ids, BOXES, strict=True):
        annotations.append({"id": id, "image_id": "photo", **rectangle(*box)})
    picture(tmp_path / "images/photo.png")
    images = [{"id": "photo", "file_name": "photo.png", "width": 40, "height": 30}]
    arguments = write_coco(tmp_path, images, annotations, category="c")
    records = coco_records(tmp_path, *arguments)
    assert set(records) == {f"photo_{id}" for id in ids}
    assert len({record.mask.lower() for record in records.values()}) == 3
    for id, box in zip(ids, BOXES, strict=True):
        assert hole_of(records[f"photo_{id}"], tmp_path).getbbox() == corners(box)


def turned_picture(path, size=(40, 30)):
    """A photograph that is stored on its side: upright it is 30x40."""
    exif = Image.Exif()
    exif[0x0112] = 6  # clockwise by 90 degrees
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path, exif=exif)


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif"])
def test_coco_without_sizes_and_outlines(tmp_path, name):
    pycocotools_mask()
    turned_picture(tmp_path / "images" / name)
    images = [{"id": 1, "file_name": name}, {"id": 2, "file_name": "lost.jpg"}]
    outlined = rectangle(5, 10, 15, 20)
    boxed = {"bbox": outlined["bbox"]}
    annotations = [
        {"id": 1, "image_id": 1, **outlined},
        {"id": 2, "image_id": 1, **boxed},
        {"id": 3, "image_id": 1, **boxed, "segmentation": [[]]},
        {"id": 4, "image_id": 2, **boxed},
    ]
    arguments = write_coco(tmp_path, images, annotations)
    records = coco_records(tmp_path, *arguments)
    assert set(records) == {"1_1", "1_2", "1_3"}
    for record in records.values():
        assert hole_of(record, tmp_path).getbbox() == (5, 10, 20, 30)
    assert [records[id].mask is None for id in ("1_1", "1_2", "1_3")] == [False, True, True]
    assert skipped(tmp_path / "m.jsonl") == {"missing image": 1}

    # The same as the file has it: upright, what is on the left there is above.
    annotations[0].update(rectangle(10, 5, 20, 15))
    for annotation in annotations[1:]:
        annotation["bbox"] = [10, 5, 20, 15]
    arguments = write_coco(tmp_path, images, annotations)
    for record in coco_records(tmp_path, *arguments, "--turn-masks", "--overwrite").values():
        assert hole_of(record, tmp_path).getbbox() == (10, 10, 25, 30)


# Masks that are drawn anew ------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_and_boxes_are_turned_with_their_images(tmp_path, orientation):
    """Pillow turns image and mask alike; the mask has no EXIF data of its own."""
    data = tmp_path / "data"
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.new("L", (40, 30))
    stored.paste(255, (4, 3, 20, 12))
    data.mkdir()
    stored.convert("RGB").save(data / "x.png", exif=exif)
    stored.save(data / "x_mask.png")
    (data / "x.txt").write_text("cup")
    box = [0.1, 0.1, 0.4, 0.3]  # x, y, width, height
    line = {"image": "x.png", "mask_image": "x_mask.png", "label": "cup", "box": box}
    (tmp_path / "list.txt").write_text(repr(line | {"image_id": "1", "box_id": "2"}))
    out = tmp_path / "m.jsonl"
    options = ["--out", out, "--turn-masks", "--overwrite", "--check"]
    sources = {
        "folder": ["--data", data],
        "official": ["--list", tmp_path / "list.txt", "--images", data, "--masks", data],
    }
    for source, arguments in sources.items():
        run = prepare(source, *arguments, *options)
        assert run.returncode == 0, run.stdout + run.stderr
        (record,) = manifest.read(out)
        image, hole = masks.load(record, tmp_path)
        assert image.convert("L").tobytes() == hole.tobytes()
        assert record.mask.startswith("m_masks/" if orientation != 1 else "data/")
    run = prepare("folder", "--data", data, *options[:2], "--overwrite", "--check")
    assert (run.returncode == 1) == (orientation > 4)
    assert ("--turn-masks turns masks" in run.stdout) == (orientation > 4)
    width, height = image.size
    left, top, right, bottom = hole.getbbox()
    assert record.box == pytest.approx((left / width, top / height, right / width, bottom / height))


def test_masks_of_other_values(tmp_path):
    data = tmp_path / "data"
    ones = Image.new("L", (40, 30))
    ones.paste(1, (10, 5, 30, 20))
    palette = ones.convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    several = palette.copy()
    several.paste(2, (0, 0, 5, 5))
    deep = Image.fromarray(np.asarray(ones).astype(np.uint16) * 300)
    coloured = Image.new("RGB", (40, 30), "red")
    drawn = {"ones": ones, "palette": palette, "several": several, "deep": deep}
    drawn |= {"one_bit": ones.point([0] + [255] * 255).convert("1"), "coloured": coloured}
    drawn |= {"rgb": Image.merge("RGB", [ones] * 3), "black": Image.new("L", (40, 30))}
    for name, mask_picture in drawn.items():
        picture(data / f"{name}.png")
        mask_picture.save(data / f"{name}_mask.png")
        (data / f"{name}.txt").write_text("cup")
    out = tmp_path / "m.jsonl"
    run = prepare("folder", "--data", data, "--out", out, "--check")
    assert [record.id for record in manifest.read(out)] == ["one_bit"]
    assert skipped(out) == {
        "mask reaches 1 of 255, expected 0 and 255": 3,
        "mask reaches 38 of 255, expected 0 and 255": 1,
        "mask of 3 colours, expected 0 and 255": 1,
        "mask reaches 76 of 255, expected 0 and 255": 1,
        "empty mask": 1,
    }
    assert "which values of a mask mean the object with --mask-values" in run.stdout

    arguments = ["folder", "--data", data, "--out", out, "--overwrite", "--check"]
    run = prepare(*arguments, "--mask-values", "1", "299-300")
    assert run.returncode == 0, run.stderr
    records = manifest.read(out)
    usable = ["deep", "one_bit", "ones", "palette", "rgb", "several"]
    assert [record.id for record in records] == usable
    for record in records:
        hole = hole_of(record, tmp_path)
        assert hole.getbbox() == (10, 5, 30, 20)
        assert hole.getextrema() == (0, 255)
    assert skipped(out) == {"mask in colours": 1, "none of --mask-values": 1}
    for words in (["1-"], ["-3"], ["x"], ["70000"], ["3-1"]):
        run = prepare(*arguments, "--mask-values", *words)
        assert run.returncode == 2
        assert "expected" in run.stderr


@pytest.fixture
def drawn_masks():
    """(150, 200) uint8 of 0 and 1, whose runs go down the columns.

    They grow and shrink, are short, are few and long, and begin with the first pixel.
    """
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:150, :200]
    ellipse = ((x - 90) / 70) ** 2 + ((y - 60) / 40) ** 2 < 1
    noise = rng.random((150, 200)) < 0.3
    corner = (x > 190) & (y > 140)
    from_first_pixel = ~ellipse
    return [part.astype(np.uint8) for part in (ellipse, noise, corner, from_first_pixel)]


def test_coco_draws_compressed_run_lengths(drawn_masks, tmp_path):
    """What pycocotools wrote of a mask is that mask again, pixel for pixel."""
    rle = pycocotools_mask()
    picture(tmp_path / "images/1.jpg", size=(200, 150))
    annotations = []
    for number, pixels in enumerate(drawn_masks):
        runs = rle.encode(np.asfortranarray(pixels))
        annotations.append(
            {
                "id": number,
                "image_id": 1,
                "category_id": 1,
                "bbox": rle.toBbox(runs).tolist(),
                "segmentation": {"size": [150, 200], "counts": runs["counts"].decode()},
            }
        )
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 200, "height": 150}],
        "categories": [{"id": 1, "name": "cup"}],
        "annotations": annotations,
    }
    instances = tmp_path / "instances.json"
    instances.write_text(json.dumps(content))
    out = tmp_path / "m.jsonl"
    run = prepare("coco", "--instances", instances, "--images", tmp_path / "images", "--out", out)
    assert run.returncode == 0, run.stderr
    records = manifest.read(out)
    assert [record.id for record in records] == ["1_0", "1_1", "1_2", "1_3"]
    for record, pixels in zip(records, drawn_masks, strict=True):
        written = Image.open(tmp_path / record.mask).convert("L")
        assert np.array_equal(np.asarray(written), pixels * 255)


def test_coco_without_pycocotools(instances, tmp_path):
    (tmp_path / "site/pycocotools").mkdir(parents=True)
    (tmp_path / "site/pycocotools/__init__.py").write_text("raise ImportError('not here')")
    run = prepare("coco", *instances, PYTHONPATH=str(tmp_path / "site"))
    assert run.returncode == 1
    assert f'"{sys.executable}" -m pip install -r "{ROOT / "requirements-coco.txt"}"' in run.stderr


def test_the_tool_explains_itself():
    for source in ("openimages", "coco", "folder", "official", "testset"):
        run = prepare(source, "--help")
        assert run.returncode == 0
        assert "--overwrite" in run.stdout


def test_requirements_are_lower_bounds_with_a_reason():
    files = sorted(ROOT.glob("requirements-*.txt"))
    names = {file.stem.removeprefix("requirements-") for file in files}
    assert {"coco", "diffusers", "evaluate", "train"} <= names
    for file in files:
        lines = file.read_text("utf-8").splitlines()
        wanted = [line for line in lines if not line.startswith("#")]
        for line in wanted:
            assert re.fullmatch(r"[\w-]+>=[\d.]+ +# .+", line), f"{file.name}: {line}"
        assert len(existing.requirements(file)) == len(wanted) > 0


# Test sets ----------------------------------------------------------------------------------------


@pytest.fixture
def objects(tmp_path):
    """Two manifests of twelve objects of six pictures; a tiny one, a broken one, one of a box."""
    data = tmp_path / "data"
    for number in range(6):
        picture(data / f"{number}.png", colour=(40 * number, 0, 0))
    mask(data / "mask.png")
    mask(data / "tiny.png", box=(0, 0, 3, 3))
    records = []
    for number in range(12):
        fields = {"image": f"{number % 6}.png", "mask": "mask.png", "label": f"cup {number}"}
        records.append(Record(f"o{number}", **fields))
    records[3] = Record("o3", "3.png", "tiny.png", label="dot")
    records[4] = Record("o4", "none.png", "mask.png", label="lost")
    records[5] = Record("o5", "5.png", box=(0.1, 0.2, 0.6, 0.8), label="box", split="validation")
    records.append(Record("whole", "0.png", caption="nothing to repaint"))
    manifest.write(data / "a.jsonl", records[:7])
    manifest.write(data / "b.jsonl", records[7:])
    return [data / "a.jsonl", data / "b.jsonl"]


def make_testset(objects, out, *options):
    """The ids that were chosen, and what is told of the test set."""
    run = prepare("testset", "--from", *objects, "--out", out, *options)
    assert run.returncode == 0, run.stderr
    about = json.loads(out.with_name(f"{out.name}.testset.json").read_text())
    assert about["sha256"] in run.stdout
    return [record.id for record in manifest.read(out, "test")], about


def test_a_test_set_is_the_same_for_everybody(objects, tmp_path):
    ids, about = make_testset(objects, tmp_path / "t.jsonl", "--count", 6)
    again, about_again = make_testset(objects[::-1], tmp_path / "u.jsonl", "--count", 6)
    assert ids == again == sorted(ids)
    assert about["sha256"] == about_again["sha256"]
    assert about["count"] == len(ids) == 6
    assert about["from"] == ["a.jsonl", "b.jsonl"]
    assert chosen.told(tmp_path / "t.jsonl") == f"{about['sha256'][:16]}, 6 samples"
    other, about_other = make_testset(objects, tmp_path / "v.jsonl", "--count", 6, "--seed", 1)
    assert other != ids
    assert about_other["sha256"] != about["sha256"]
    for record in manifest.read(tmp_path / "t.jsonl"):
        for kind in masks.VARIANTS:
            assert masks.cut_hole(record, hole_of(record, tmp_path), kind).getextrema() == (0, 255)
    # The content counts: another picture of the same name is another test set.
    changed = min(tmp_path.glob("data/[0-9].png"))
    for name in ("0", "1", "2", "3", "5"):
        picture(changed.with_name(f"{name}.png"), colour=(1, 2, 3))
    assert make_testset(objects, tmp_path / "w.jsonl", "--count", 6)[1]["sha256"] != about["sha256"]
    with open(tmp_path / "t.jsonl", "a") as file:
        file.write("\n")
    assert chosen.told(tmp_path / "t.jsonl").endswith("the manifest was changed afterwards")
    assert chosen.told(objects[0]) is None


def test_a_test_set_keeps_its_rules(objects, tmp_path):
    ids, about = make_testset(objects, tmp_path / "t.jsonl", "--count", 10, "--min-area", 0.02)
    assert set(ids) == {f"o{number}" for number in range(12)} - {"o3", "o4"}
    assert about["rules"]["min_area"] == 0.02
    ids, about = make_testset(objects, tmp_path / "u.jsonl", "--count", 6, "--per-image", 1)
    assert len(ids) == 6
    assert about["rules"]["holes"] == ["segment", "box"]


def test_a_test_set_that_cannot_be_had_is_explained(objects, tmp_path):
    out = tmp_path / "t.jsonl"
    for options, words in (
        (["--count", "12"], "11 samples are usable by these rules, --count is 12; "),
        (["--count", "paper-coco"], "usable by these rules, --count is 9311; "),
        (["--count", "none"], "none is no number of samples, expected 1 or more, or paper-open"),
        (["--count", "3", "--from", tmp_path / "no.jsonl"], "no.jsonl cannot be read"),
    ):
        run = prepare("testset", "--from", *objects, "--out", out, *options)
        assert run.returncode in (1, 2)
        assert words in run.stderr
        assert not out.exists()
    make_testset(objects, out, "--count", 3)
    run = prepare("testset", "--from", *objects, "--out", out, "--count", 3)
    assert "exists already and was not touched. Give --overwrite" in run.stderr
    make_testset(objects, out, "--count", 4, "--overwrite")
