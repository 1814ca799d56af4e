"""Train the demo model from nothing, by the same code that trains CAT-Diffusion, and write it with its log.

    python tools/train_demo.py [--work runs/demo] [--out models/cat_demo_model.safetensors]

Every step continues where it was stopped; what is done is not done again. Steps that do not need each other can be
started side by side with --only.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comfyui import ROOT

LICENCE = "MIT"
PROVENANCE = "demo model, tools/train_demo.py, procedural scenes"
LOG_EVERY = 10  # steps between the lines of the log that is kept


@dataclass(frozen=True)
class Run:
    """One stage's numbers."""

    stage: str
    steps: int
    batch_size: int
    rate: float  # of new parts; a stage's pretrained parts have a tenth
    base: tuple[
        str, ...
    ]  # the earlier runs whose weights it starts from; "start" is the fresh networks


SCENES = 10_000
CLIP = Run("clip", 3000, 32, 2e-3, ("start",))
VAE = Run("vae", 2800, 16, 1e-3, ("start",))
WHOLE_PICTURES = 2500  # the VAE's step from which it sees whole pictures instead of crops
RUNS = (
    Run("sem-inpainter", 1600, 32, 1e-3, ("start", "clip")),
    Run("unet", 6000, 32, 1e-3, ("start", "clip", "vae")),
    Run("ref-adapter-unet", 1000, 32, 5e-4, ("start", "clip", "vae", "unet")),
    Run("cascade", 1500, 32, 5e-4, ("start", "clip", "vae", "sem-inpainter", "ref-adapter-unet")),
)
ORDER = ("scenes", CLIP.stage, VAE.stage, "cache", *(run.stage for run in RUNS), "file")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "runs/demo",
        help="folder for scenes, caches and checkpoints",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "models/cat_demo_model.safetensors")
    parser.add_argument(
        "--only", choices=ORDER, nargs="+", default=ORDER, help="these steps instead of all"
    )
    parser.add_argument(
        "--shorter",
        type=int,
        default=1,
        metavar="N",
        help="an Nth of all steps and scenes, to try it out",
    )
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    arguments = parser.parse_args()
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.cpu = arguments.cpu or not (
        torch.cuda.is_available() or torch.backends.mps.is_available()
    )
    from cat_diffusion.cat_core.training.loop import TrainingError

    try:
        for name in ORDER:
            if name in arguments.only:
                print(f"\n== {name}", flush=True)
                _do(name, arguments)
    except KeyboardInterrupt:
        print("\nStopped. The same command continues.")
        return 130
    except TrainingError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


def _do(name: str, arguments) -> None:
    from demo_model import networks

    work, shorter = arguments.work, arguments.shorter
    if name == "scenes":
        from demo_model import scenes

        if not (work / "scenes/manifest.jsonl").exists():
            scenes.write(work / "scenes", scenes.TRAIN[: SCENES // shorter])
    elif name in (CLIP.stage, VAE.stage):
        _pretrain(CLIP if name == CLIP.stage else VAE, work, shorter, arguments.cpu)
    elif name == "cache":
        from training import stage_run

        stage_run.encoded_samples(
            stage_run.load(_weights(work, ("start", "clip", "vae")), True),
            "diffusion",
            work / "scenes/manifest.jsonl",
            "train",
            networks.SIZE,
            work / "cache",
        )
    elif name == "file":
        _write(work, arguments.out)
    else:
        _train(next(run for run in RUNS if run.stage == name), work, shorter, arguments.cpu)


def _weights(work: Path, runs: Sequence[str]) -> list[Path]:
    """The newest weights of each run; of parts that several have, the last one's count."""
    from cat_diffusion.cat_core.training.loop import TrainingError

    paths = []
    for run in runs:
        whole = {"start": work / "start.safetensors", VAE.stage: work / "vae.safetensors"}.get(run)
        path = whole or newest(work / run)
        if not path.exists():
            raise TrainingError(f"There is no {path}. The step {run} comes first.")
        paths.append(path)
    return paths


def newest(run: Path) -> Path:
    """The latest weights of a run; of no run, where they would be."""
    return max(run.glob("checkpoint-*[0-9]"), default=run) / "weights.safetensors"


def fresh_networks(work: Path) -> Path:
    """A file with all networks, not trained, written once."""
    import torch

    from cat_diffusion.cat_core import weights
    from demo_model import networks

    path = work / "start.safetensors"
    if not path.exists():
        parts = networks.networks(torch.Generator().manual_seed(0))
        tensors = {part: module.state_dict() for part, module in parts.items()}
        weights.save(
            path,
            weights.flat(tensors),
            weights.header(
                tensors,
                networks.architecture(parts["unet"]),
                licence=LICENCE,
                provenance=f"{PROVENANCE}, not trained",
            ),
        )
    return path


def _pretrain(run: Run, work: Path, shorter: int, cpu: bool) -> None:
    """CLIP or VAE, on scenes drawn as they are needed."""
    import torch

    from cat_diffusion.cat_core import weights
    from cat_diffusion.cat_core.training import loop
    from cat_diffusion.cat_core.training.stages import Stage
    from cat_diffusion.nodes.host.build import build_clip
    from cat_diffusion.nodes.host.clip import plain_tokens
    from demo_model import networks
    from demo_model import pretraining as pretraining

    file = weights.read(fresh_networks(work))
    modules = networks.networks(torch.Generator().manual_seed(0))
    if run.stage == CLIP.stage:
        clip = build_clip(file)
        ids = {}

        def tokenize(texts):
            for text in texts:
                if text not in ids:
                    ids[text] = [token for token, _ in plain_tokens(clip, text)["l"][0]]
            return torch.tensor([ids[text] for text in texts])

        modules = {part: modules[part] for part in ("clip_text", "clip_vision")}
        objective = pretraining.Contrastive(**modules, labels=tokenize(pretraining.LABELS))
        source, micro = pretraining.clip_source(tokenize, run.batch_size, seed=0), run.batch_size
    else:
        modules = {"vae": modules["vae"]}
        objective = pretraining.Reconstruction(**modules)
        source, micro = (
            pretraining.vae_source(run.batch_size, 1, WHOLE_PICTURES // shorter),
            run.batch_size,
        )
    stage = Stage(run.stage, "pretraining", tuple((part, run.rate) for part in modules))
    settings = loop.Settings(
        max(run.steps // shorter, 1),
        run.batch_size,
        micro,
        warmup=50,
        final_rate=0.01,
        save_every=100,
    )
    loop.train(
        stage,
        objective,
        modules,
        source,
        work / run.stage,
        settings,
        file.architecture,
        provenance=PROVENANCE,
        licence=LICENCE,
        cpu=cpu,
    )
    if run is VAE:
        with torch.no_grad():
            vae = modules["vae"].cpu().eval()
            pictures = pretraining.vae_source(256, 2, 0)(0, range(256))["picture"]
            latents = torch.cat(
                [vae.quant_conv(vae.encoder(some))[:, :4] for some in pictures.split(8)]
            )
        networks.scale_latents(vae, latents)
        parts = {"vae": vae.state_dict()}
        weights.save(
            work / "vae.safetensors",
            weights.flat(parts),
            weights.header(parts, file.architecture, licence=LICENCE, provenance=PROVENANCE),
            overwrite=True,
        )


def _train(run: Run, work: Path, shorter: int, cpu: bool) -> None:
    """One of CAT-Diffusion's own stages, as tools/train.py runs it."""
    from cat_diffusion.cat_core.training.stages import NEW, STAGES

    train_stage(
        STAGES[run.stage].scaled(run.rate / NEW),
        work / run.stage,
        _weights(work, run.base),
        work,
        max(run.steps // shorter, 1),
        run.batch_size,
        cpu=cpu,
    )


def train_stage(
    stage,
    run: Path,
    base: Sequence[Path],
    work: Path,
    steps: int,
    batch_size: int,
    final_rate: float = 0.02,
    warmup: int = 50,
    cpu: bool = True,
) -> None:
    """A stage of tools/train.py on the scenes and the cache in `work`; `stage` may have other rates than the table's."""
    import train

    from demo_model import networks
    from training import stage_run

    options = [
        "--run",
        run,
        "--cache",
        work / "cache",
        "--steps",
        steps,
        "--batch-size",
        batch_size,
        "--micro-batch-size",
        batch_size,
        "--size",
        networks.SIZE,
        "--warmup",
        warmup,
        "--final-rate",
        final_rate,
        "--save-every",
        200,
        "--samples-every",
        0,
        "--licence",
        LICENCE,
    ]
    words = [stage.name, "--data", work / "scenes/manifest.jsonl", *options, "--base", *base]
    stage_run.run(
        train.command_line().parse_args([str(word) for word in words] + ["--cpu"] * cpu), stage
    )


def _write(work: Path, out: Path) -> None:
    """The file that ships, in fp16, and beside it what happened on the way."""
    import torch

    from cat_diffusion.cat_core import weights

    file = weights.merge(
        [weights.read(path) for path in _weights(work, ("start", "clip", "vae", "cascade"))]
    )
    weights.save(
        out,
        weights.flat(file.parts),
        weights.header(file.parts, file.architecture, licence=LICENCE, provenance=PROVENANCE),
        torch.float16,
        overwrite=True,
    )
    with open(out.with_suffix(".log.csv"), "w", newline="") as log:
        writer = csv.writer(log)
        for stage in (CLIP.stage, VAE.stage, *(run.stage for run in RUNS)):
            with open(work / stage / "log.csv", newline="") as whole:
                rows = list(csv.reader(whole))
            writer.writerow(["stage", *rows[0]])
            writer.writerows(
                [stage, row[0], *(f"{float(value):.4g}" for value in row[1:])]
                for row in rows[1:]
                if int(row[0]) % LOG_EVERY == 0 or row is rows[-1]
            )
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
