"""The long forms, which `tools/test.py --soak` runs: each prints its figure.

Commands and a server are killed at any moment, run again, and must end as if nothing had been; the
disk is full; four clients and hundreds of prompts leave memory as it was.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT
from PIL import Image, ImageDraw

from comfyui.local_server import LocalServer, ServerError

pytestmark = pytest.mark.skipif("CAT_DIFFUSION_SOAK" not in os.environ, reason="runs with --soak")

KILLS = int(os.environ.get("CAT_DIFFUSION_SOAK", "1")) * 5  # of each command
PROMPTS = 300
WARM = 60  # prompts after which everything is loaded
CLIENTS = 4
TINY_DISK = "300k"
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A manifest of eight records, and a folder of triples."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 255, (40, 48, 3), np.uint8)
        Image.fromarray(noise).resize((96, 80)).save(folder / f"{i}.png")
        mask = Image.new("L", (96, 80))
        ImageDraw.Draw(mask).ellipse((10 + i, 10, 50 + i, 60), fill=255)
        mask.save(folder / f"{i}_mask.png")
        (folder / f"{i}.txt").write_text("cup")
        files = {"image": f"{i}.png", "mask": f"{i}_mask.png", "label": "cup", "split": "test"}
        lines.append(json.dumps({"id": f"s{i}", **files}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def commands(data, base, server, tmp_path_factory):
    """Name -> the command that writes into a folder."""
    tools = ROOT / "tools"
    tiny = base / "models/cat_diffusion/tiny.safetensors"
    manifest = data / "manifest.jsonl"
    workflow = tmp_path_factory.mktemp("workflow") / "cat.json"
    nodes = json.loads((ROOT / "workflows/baselines/cat.json").read_text())
    nodes["1"]["inputs"]["checkpoint"] = "tiny.safetensors"
    for node in nodes.values():
        if node["class_type"] == "CATScheduler":
            node["inputs"]["steps"] = 2
    workflow.write_text(json.dumps(nodes))
    made = tmp_path_factory.mktemp("made")
    generate = [tools / "generate.py", workflow, "--manifest", manifest, "--size", "64"]
    generate += ["--hole", "box", "--server", server.url, "--out"]
    train = [tools / "train.py", "sem-inpainter", "--base", tiny, "--data", manifest]
    train += ["--split", "test", "--cpu", "--size", "64", "--save-every", "2", "--steps", "6"]
    train += ["--batch-size", "4", "--micro-batch-size", "2"]
    evaluate = [tools / "evaluate.py", made / "out", "--cpu", "--resamples", "50", "--threads", "1"]
    run([*generate, made / "out"])
    return {
        "convert": lambda out: [tools / "convert.py", tiny, "--full", out / "x.safetensors"],
        "prepare_data": lambda out: [
            *(tools / "prepare_data.py", "folder", "--data", linked(data, out), "--overwrite"),
            *("--split", "test", "--out", out / "manifest.jsonl"),
        ],
        "train": lambda out: [*train, "--run", out / "run", "--cache", out / "cache"],
        "generate": lambda out: [*generate, out / "made"],
        "evaluate": lambda out: [*evaluate, "--json", out / "m.json", "--html", out / "report"],
    }


def linked(data, out):
    """The data inside the folder of its manifest, where it has to be."""
    link = out / "data"
    if not link.exists():
        link.symlink_to(data, target_is_directory=True)
    return link


def begin(words):
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(words, code=0):
    """What a command prints."""
    process = begin(words)
    output, _ = process.communicate(timeout=540)
    assert process.returncode == code, f"{words}\n{output[-3000:]}"
    return output


def contents(folder) -> dict[str, str]:
    """A digest of each file that a command wrote, without what tells its place and time."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.name in ("lock", "state.pt", "log.csv", "run.json"):
            continue
        content = path.read_bytes()
        if path.suffix == ".json":
            facts = json.loads(content)
            for changing in ("seconds", "server"):
                facts.pop(changing, None)
            content = json.dumps(facts, sort_keys=True).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


@pytest.mark.parametrize("name", ["convert", "prepare_data", "train", "generate", "evaluate"])
def test_killed_commands_end_as_if_they_had_not_been(commands, name, tmp_path):
    start = time.monotonic()
    (tmp_path / "whole").mkdir()
    run(commands[name](tmp_path / "whole"))
    whole = time.monotonic() - start
    expected = contents(tmp_path / "whole")
    moments = []
    for number in range(KILLS):
        out = tmp_path / f"{number}"
        out.mkdir()
        moments.append(random.uniform(0.3, 1) * whole)
        process = begin(commands[name](out))
        try:
            process.communicate(timeout=moments[-1])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        again = commands[name](out)
        if name == "convert" and (out / "x.safetensors").exists():
            again = [*again, "--overwrite"]
        run(again)
        assert contents(out) == expected
        shutil.rmtree(out)
    print(f"\n{name}: {KILLS} kills, the last {moments[-1]:.1f} s after the start, nothing lost")


def test_a_server_killed_while_it_trains_leaves_whole_files(base, tmp_path, prompt):
    """The weights of a training node are there whole or not at all, and the next server starts."""
    things = base / "input/soak"
    things.mkdir(exist_ok=True)
    Image.new("RGB", (48, 40), "red").save(things / "cup_image.png")
    mask = Image.new("L", (48, 40))
    ImageDraw.Draw(mask).rectangle((8, 8, 30, 30), fill=255)
    mask.save(things / "cup_mask.png")
    training = {
        "1": prompt["1"],
        "sem": {
            "class_type": "CATTrainSemInpainter",
            "inputs": {
                **{"clip_vision": ["1", 3], "clip": ["1", 1], "folder": "soak", "steps": 20},
                **{"batch_size": 2, "learning_rate": 1e-3, "masked_loss": False, "seed": 0},
                **{"precision": "fp32", "filename_prefix": "soak/sem", "licence": "CC0"},
            },
        },
    }
    saved = base / "models/cat_diffusion/soak"
    for _ in range(KILLS):
        with LocalServer(base, "--cpu") as server, ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.run, training)
            time.sleep(random.uniform(0.2, 4))
            os.kill(server.process.pid, signal.SIGKILL)
            with contextlib.suppress(ServerError, OSError):  # it is gone
                answer.result()
    with LocalServer(base, "--cpu") as server:
        result = server.run(training)
        assert result.error is None
    files = sorted(path.name for path in saved.iterdir())
    assert all(name.endswith(".safetensors") for name in files)
    for name in files:
        run([ROOT / "tools/convert.py", saved / name, "--cat-weights", tmp_path / name])
    print(f"\nserver in a training node: {KILLS} kills, {len(files)} files of weights, all whole")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk")
@pytest.mark.parametrize("name", ["convert", "prepare_data", "train", "generate", "evaluate"])
def test_a_full_disk_is_a_sentence_and_what_was_there_stays(commands, name, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TINY_DISK}", "tmpfs", disk], check=True)
    try:
        (disk / "kept").write_bytes(bytes(40_000))
        with contextlib.suppress(OSError):  # up to the last page
            (disk / "filling").write_bytes(bytes(300_000))
        process = begin(commands[name](disk))
        output, _ = process.communicate(timeout=540)
        assert process.returncode != 0, output
        assert "Traceback" not in output, output[-3000:]
        assert "space" in output, output[-3000:]
        assert (disk / "kept").read_bytes() == bytes(40_000)
        assert not list(disk.rglob("*.partial"))
    finally:
        subprocess.run(["umount", disk], check=True)
    print(f"\n{name} on a full disk: {output.strip().splitlines()[-1][:150]}")


def fresh(prompt, number):
    """The prompt with nothing of it in the host's cache behind its loaders."""
    changed = prompt.copy()
    changed.inputs("KSampler")["seed"] = number
    changed.inputs("CATSemanticInpaint")["text"] = f"cup {number}"
    return changed


def test_four_clients_get_what_one_gets(server, prompt):
    def latent(number):
        result = server.run(fresh(prompt, number % 8))
        assert result.error is None
        path = server.image_path(result.outputs["latent"]["latents"][0])
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()

    alone = [latent(number) for number in range(8)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        together = list(pool.map(latent, range(40)))
    assert all(together[number] == alone[number % 8] for number in range(40))
    print(f"\n{CLIENTS} clients: 40 prompts, bit-equal to one client's")


def resident(pid) -> int:
    """Bytes of a process in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def forget_history(server):
    """Let the host forget its prompts, about a hundred objects each, which it keeps by itself."""
    asked = urllib.request.Request(
        f"{server.url}/history",
        data=b'{"clear": true}',
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked):
        pass


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="reads memory from /proc")
def test_memory_and_objects_stay_flat(base, prompt):
    prompt.add("count", "HelperCount", image=prompt["17"]["inputs"]["images"])
    memory = []
    objects = []
    with LocalServer(base, "--cpu", "--cache-none") as server:
        for number in range(PROMPTS):
            result = server.run(fresh(prompt, number))
            assert result.error is None
            forget_history(server)
            memory.append(resident(server.process.pid))
            objects.append(result.outputs["count"]["counts"])
    warm = slice(WARM, WARM + 40)
    last = slice(-40, None)
    more_memory = statistics.median(memory[last]) - statistics.median(memory[warm])
    python_objects, tensors, models = (
        statistics.median(row[i] for row in objects[last])
        - statistics.median(row[i] for row in objects[warm])
        for i in range(3)
    )
    print(
        f"\n{PROMPTS} prompts: memory {statistics.median(memory[warm]) / MEGABYTE:.0f} MB"
        f"{more_memory / MEGABYTE:+.1f} MB, {python_objects:+.0f} Python objects, "
        f"{tensors:+.0f} tensors, {models:+.0f} loaded models"
    )
    assert more_memory < 20 * MEGABYTE
    assert python_objects < 2 * PROMPTS
    assert tensors == 0
    assert models == 0
