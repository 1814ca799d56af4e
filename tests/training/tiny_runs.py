"""tools/train.py as a user runs it, on tiny models and pictures."""

import csv
import subprocess
import sys
import time

from paths import ROOT

SQUASHED = ("--pictures", "squash")


def command(stage, base, data, run, *more):
    bases = base if isinstance(base, list) else [base]
    words = [sys.executable, ROOT / "tools/train.py", stage, "--base", *bases]
    words += ["--data", data, "--run", run, "--cpu", "--size", "64", "--save-every", "2"]
    words += ["--batch-size", "4", "--micro-batch-size", "2", *more]
    return list(map(str, words))


def train(*arguments, code=0, **kwargs):
    done = subprocess.run(command(*arguments), capture_output=True, text=True, **kwargs)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done


def log_rows(run):
    with open(run / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def losses(run):
    rows = log_rows(run)
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return [float(row["loss"]) for row in rows]


def wait_for(happened):
    end = time.monotonic() + 120
    while not happened() and time.monotonic() < end:
        time.sleep(0.02)
