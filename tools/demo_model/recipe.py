"""Train the demo model from nothing, by the code that trains CAT-Diffusion, and write it.

    python tools/run.py demo_model.recipe [--work runs/demo] [--out FILE.safetensors]

Every step continues where it was stopped; what is done is not done again. Steps that do not need
each other can be started side by side with --only.
"""

import argparse
import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from cat_diffusion.cat_core import weights
from cat_diffusion.cat_core.config import Architecture
from cat_diffusion.cat_core.errors import CatError
from cat_diffusion.cat_core.knowledge import Knowledge
from cat_diffusion.cat_core.training import loop
from cat_diffusion.cat_core.training.settings import Settings, TrainingError, TrainingRun
from cat_diffusion.cat_core.training.stages import NEW, STAGES, Stage
from cat_diffusion.nodes.host.build import build_clip
from cat_diffusion.nodes.host.clip import plain_tokens
from comfyui import ROOT, launch
from demo_model import networks, pretraining, scenes
from demo_model.demo_stages import (
    LICENCE,
    PROVENANCE,
    fresh_networks,
    newest,
    train_stage,
    write_parts,
)
from training import stage_parts

LOG_EVERY = 10  # steps between the lines of the log that is kept
SCENES = 10_000
# Pairs that were held out are put together from the others.
KNOWLEDGE = Knowledge(tuple(f"{colour} {shape}" for shape, colour in scenes.PAIRS), networks.SIZE)
WHOLE_PICTURES = 2500  # the VAE's step from which it sees whole pictures instead of crops


@dataclass(frozen=True)
class PlannedStage:
    """One stage's numbers.

    Attributes:
        rate: of new parts; a stage's pretrained parts have a tenth.
        base: the earlier stages whose weights it starts from; "start" is the fresh networks.
    """

    name: str
    steps: int
    batch_size: int
    rate: float
    base: tuple[str, ...]


CLIP = PlannedStage("clip", steps=3000, batch_size=32, rate=2e-3, base=("start",))
VAE = PlannedStage("vae", steps=2800, batch_size=16, rate=1e-3, base=("start",))
SEM_INPAINTER = PlannedStage(
    "sem-inpainter", steps=1600, batch_size=32, rate=1e-3, base=("start", "clip")
)
UNET = PlannedStage("unet", steps=6000, batch_size=32, rate=1e-3, base=("start", "clip", "vae"))
REF_ADAPTER = PlannedStage(
    "ref-adapter-unet",
    steps=1000,
    batch_size=32,
    rate=5e-4,
    base=("start", "clip", "vae", "unet"),
)
CASCADE = PlannedStage(
    "cascade",
    steps=1500,
    batch_size=32,
    rate=5e-4,
    base=("start", "clip", "vae", "sem-inpainter", "ref-adapter-unet"),
)
OWN_STAGES = (SEM_INPAINTER, UNET, REF_ADAPTER, CASCADE)  # CAT-Diffusion's


def main() -> int:
    steps = _steps()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "runs/demo",
        help="folder for scenes, caches and checkpoints",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "models/cat_demo_model.safetensors")
    parser.add_argument(
        "--only", choices=steps, nargs="+", default=list(steps), help="these steps instead of all"
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
    launch.limit_threads(arguments.threads)
    arguments.cpu = arguments.cpu or not launch.has_gpu()
    try:
        for name, step in steps.items():
            if name in arguments.only:
                print(f"\n== {name}", flush=True)
                step(arguments)
    except KeyboardInterrupt:
        print("\nStopped. The same command continues.")
        return 130
    except CatError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


def _steps() -> dict[str, Callable]:
    """What is done, in order: name -> function of the command's arguments."""
    steps = {"scenes": _draw_scenes, "clip": _train_clip, "vae": _train_vae, "cache": _encode}
    for planned in OWN_STAGES:
        steps[planned.name] = partial(_train_own, planned)
    steps["file"] = _write
    return steps


def _draw_scenes(arguments) -> None:
    folder = arguments.work / "scenes"
    if not (folder / "manifest.jsonl").exists():
        scenes.write(folder, scenes.TRAIN[: SCENES // arguments.shorter])


def _train_clip(arguments) -> None:
    """CLIP, on scenes drawn as they are needed."""
    file = weights.read(fresh_networks(arguments.work))
    fresh = networks.networks(torch.Generator().manual_seed(0))
    modules = {"clip_text": fresh["clip_text"], "clip_vision": fresh["clip_vision"]}
    tokenize = _tokenizer(build_clip(file))
    objective = pretraining.Contrastive(**modules, labels=tokenize(pretraining.LABELS))
    source = pretraining.clip_source(tokenize, CLIP.batch_size, seed=0)
    _pretrain(CLIP, arguments, modules, objective, source, file.architecture)


def _tokenizer(clip) -> pretraining.Tokenize:
    """The host's tokenizer, for a few thousand texts that come again and again."""
    ids: dict[str, list[int]] = {}

    def tokenize(texts):
        for text in texts:
            if text not in ids:
                ids[text] = [token for token, _ in plain_tokens(clip, text)["l"][0]]
        return torch.tensor([ids[text] for text in texts])

    return tokenize


def _train_vae(arguments) -> None:
    """The VAE, on scenes drawn as they are needed; then its latents get the U-Net's scale."""
    file = weights.read(fresh_networks(arguments.work))
    vae = networks.networks(torch.Generator().manual_seed(0))["vae"]
    source = pretraining.vae_source(
        VAE.batch_size, seed=1, whole_from=WHOLE_PICTURES // arguments.shorter
    )
    objective = pretraining.Reconstruction(vae)
    _pretrain(VAE, arguments, {"vae": vae}, objective, source, file.architecture)
    vae = vae.cpu().eval()
    with torch.no_grad():
        networks.scale_latents(vae, _latents(vae))
    write_parts(
        arguments.work / "vae.safetensors",
        {"vae": vae.state_dict()},
        file.architecture,
        provenance=PROVENANCE,
        overwrite=True,
    )


def _latents(vae: nn.Module) -> torch.Tensor:
    """The latents of 256 scenes, unscaled."""
    pictures = pretraining.vae_source(256, seed=2, whole_from=0)(0, range(256))["picture"]
    latents = []
    for batch in pictures.split(8):
        latents.append(vae.quant_conv(vae.encoder(batch))[:, :4])
    return torch.cat(latents)


def _pretrain(
    planned: PlannedStage,
    arguments,
    modules: Mapping[str, nn.Module],
    objective: nn.Module,
    source: pretraining.Source,
    architecture: Architecture,
) -> None:
    settings = Settings(
        steps=max(planned.steps // arguments.shorter, 1),
        batch_size=planned.batch_size,
        micro_batch_size=planned.batch_size,
        warmup=50,
        final_rate=0.01,
        save_every=100,
    )
    rates = tuple((part, planned.rate) for part in modules)
    training = TrainingRun(
        Stage(planned.name, "pretraining", rates),
        modules,
        objective,
        settings,
        folder=arguments.work / planned.name,
        architecture=architecture,
        provenance=PROVENANCE,
        licence=LICENCE,
    )
    loop.train(training, source, cpu=arguments.cpu)


def _encode(arguments) -> None:
    """What the frozen networks make of the scenes, for all of CAT-Diffusion's own stages."""
    bases = _weights(arguments.work, ("start", "clip", "vae"))
    stage_parts.encoded_samples(
        stage_parts.load(bases, True),
        "diffusion",
        arguments.work / "scenes/manifest.jsonl",
        size=networks.SIZE,
        cache=arguments.work / "cache",
    )


def _train_own(planned: PlannedStage, arguments) -> None:
    """One of CAT-Diffusion's own stages, as tools/train.py runs it."""
    train_stage(
        STAGES[planned.name].scaled(planned.rate / NEW),
        arguments.work / planned.name,
        base=_weights(arguments.work, planned.base),
        work=arguments.work,
        steps=max(planned.steps // arguments.shorter, 1),
        batch_size=planned.batch_size,
        final_rate=0.02,
        cpu=arguments.cpu,
    )


def _write(arguments) -> None:
    """The file that ships, in fp16, and beside it what happened on the way."""
    paths = _weights(arguments.work, ("start", "clip", "vae", "cascade"))
    file = weights.merge([weights.read(path) for path in paths])
    out = arguments.out
    write_parts(
        out,
        file.parts,
        file.architecture,
        provenance=PROVENANCE,
        knowledge=KNOWLEDGE,
        dtype=torch.float16,
        overwrite=True,
    )
    with open(out.with_suffix(".log.csv"), "w", newline="") as log:
        writer = csv.writer(log)
        for planned in (CLIP, VAE, *OWN_STAGES):
            writer.writerows(_log_lines(arguments.work, planned.name))
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


def _log_lines(work: Path, stage: str) -> list[list[str]]:
    """Every LOG_EVERYth line of a stage's log and its last, under their header."""
    with open(work / stage / "log.csv", newline="") as file:
        header, *lines = csv.reader(file)
    kept = [["stage", *header]]
    for line in lines:
        step, *numbers = line
        if int(step) % LOG_EVERY == 0 or line is lines[-1]:
            kept.append([stage, step, *(f"{float(number):.4g}" for number in numbers)])
    return kept


def _weights(work: Path, stages: Sequence[str]) -> list[Path]:
    """The newest weights of each stage; of parts that several have, the last one's count."""
    paths = []
    for stage in stages:
        if stage in ("start", VAE.name):
            path = work / f"{stage}.safetensors"
        else:
            path = newest(work / stage)
        if not path.exists():
            raise TrainingError(f"There is no {path}. The step {stage} comes first.")
        paths.append(path)
    return paths
