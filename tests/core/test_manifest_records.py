"""Records of manifests that are mapped instead of held."""

import json
import pickle
import tracemalloc

import pytest

from cat_diffusion.cat_core.data import manifest
from cat_diffusion.cat_core.data.manifest import ManifestError, Record
from cat_diffusion.cat_core.data.manifest_records import ManifestRecords

RECORDS = [
    Record("1", "a/1.jpg", mask="m/1.png", box=(0.1, 0.2, 0.6, 0.9), label="Bus"),
    Record("2", "odd\udcff name.png", label="T\u00fcr\u2028\u9580", split="validation"),
    Record("3", "3.png", caption="hole-free"),
]


def record(i):
    name = f"{i:016x}"
    return Record(
        f"{name}_8ae41a6b",
        f"train/{name}.jpg",
        mask=f"masks/{name[-1]}/{name}_m01bjv_8ae41a6b.png",
        box=(0.1 + i * 1e-7, 0.2, 0.6, 0.9),
        label=f"class {i % 300}",
    )


def test_they_are_those_of_the_manifest(tmp_path):
    path = tmp_path / "m.jsonl"
    manifest.write(path, RECORDS)
    records = ManifestRecords([path])
    assert list(records) == RECORDS
    assert records[-1] == RECORDS[2]
    assert records[:2] == RECORDS[:2]
    assert records.folder == tmp_path
    assert list(pickle.loads(pickle.dumps(records))) == RECORDS
    for split in manifest.SPLITS:
        assert list(ManifestRecords([path], split)) == manifest.read(path, split)
    with pytest.raises(IndexError):
        records[3]
    path.write_bytes(path.read_bytes()[:-1])  # no line end at the end
    assert list(ManifestRecords([path])) == RECORDS


def test_several_manifests_are_named_from_their_common_folder(tmp_path):
    manifest.write(tmp_path / "one/m.jsonl", RECORDS[:1])
    manifest.write(tmp_path / "m.jsonl", RECORDS[2:])
    records = ManifestRecords([tmp_path / "one/m.jsonl", tmp_path / "m.jsonl"])
    assert records.folder == tmp_path
    assert records.lengths == [1, 1]
    assert [(each.image, each.mask) for each in records] == [
        ("one/a/1.jpg", "one/m/1.png"),
        ("3.png", None),
    ]


def test_what_is_wrong_is_said_as_by_the_manifest(tmp_path):
    path = tmp_path / "m.jsonl"
    good = [json.dumps({"id": str(i), "image": "x.png", "label": "cup"}) for i in range(90)]
    for line, words in (
        ('{"id": "95"}', "m.jsonl, line 91: image is missing"),
        (good[7], "m.jsonl, line 91: id '7' was used before, expected every id once"),
    ):
        path.write_text("\n".join([*good, line, good[3]]) + "\n")
        with pytest.raises(ManifestError, match=words):
            ManifestRecords([path])
    with pytest.raises(ManifestError, match=r"none.jsonl cannot be read .*prepare_data.py"):
        ManifestRecords([tmp_path / "none.jsonl"])
    with pytest.raises(ManifestError, match="split is 'val'"):
        ManifestRecords([path], "val")


def test_a_manifest_that_changes_meanwhile_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    manifest.write(path, RECORDS)
    records = ManifestRecords([path])
    manifest.write(path, RECORDS[:1])
    with pytest.raises(ManifestError, match=r"m.jsonl has changed since the command was started"):
        records[0]


def test_a_record_takes_8_bytes(tmp_path):
    path = tmp_path / "m.jsonl"
    manifest.write(path, map(record, range(5000)))
    ManifestRecords([path])  # which imports what it needs
    tracemalloc.start()
    records = ManifestRecords([path])
    assert records[4999] == record(4999)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size / 5000 < 12
