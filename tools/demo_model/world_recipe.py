"""Train the demo model on things in photographs, from nothing, by CAT-Diffusion's own code.

    python tools/run.py demo_model.world_recipe --world FOLDER [--work runs/world]

Every stage continues where it was stopped; what is done is not done again. Several processes share
the work, a core each, when torchrun starts them; what they read is best filled before, by --draw.
"""

import argparse
import csv
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cat_diffusion.cat_core import weights
from cat_diffusion.cat_core.config import Architecture
from cat_diffusion.cat_core.errors import CatError
from cat_diffusion.cat_core.knowledge import Knowledge
from cat_diffusion.cat_core.training import loop
from cat_diffusion.cat_core.training.assemble import assemble
from cat_diffusion.cat_core.training.settings import Settings, TrainingRun
from cat_diffusion.cat_core.training.stages import NEW, STAGES, Stage
from cat_diffusion.nodes.host.build import build_clip
from cat_diffusion.nodes.host.clip import plain_tokens
from cat_diffusion.nodes.host.denoiser import Denoiser
from comfyui import ROOT, launch
from demo_model import networks, world, world_samples
from demo_model.pretraining import Reconstruction
from demo_model.world_clip import WorldContrastive
from demo_model.world_texts import Texts

LICENCE = "MIT"
PROVENANCE = "demo model, tools/demo_model/world_recipe.py, Fluent and Noto emoji in photographs"


@dataclass(frozen=True)
class StagePlan:
    """One stage's numbers.

    Attributes:
        stage: of training/stages.py, or one of its kind.
        rate: of new parts; a stage's pretrained parts have a tenth.
        snr_gamma: see objectives.Diffusion.
        ema_decay: of an average that is kept beside the weights, to look at them on the way.
    """

    stage: Stage
    steps: int
    batch_size: int
    rate: float
    warmup: int = 100
    snr_gamma: float = 0.0
    ema_decay: float = 0.0


def _pretraining(name: str, *parts: str) -> Stage:
    return Stage(name, "pretraining", tuple((part, NEW) for part in parts))


# So that every timestep's prediction of the picture, and not of the noise, counts about alike: what
# is drawn is decided where noise is all there is, and an error there is small as one of the noise.
SNR_GAMMA = 0.05
# The U-Net has seen too little to be called pretrained: it learns as fast as RefAdapter.
_WITH_UNET = dataclasses.replace(
    STAGES["ref-adapter-unet"], rates=(("ref_adapter", NEW), ("unet", NEW))
)
PLANS = {
    "clip": StagePlan(_pretraining("clip", "clip_text", "clip_vision"), 4000, 128, 1e-3),
    "vae": StagePlan(_pretraining("vae", "vae"), 5000, 64, 1e-3),
    "unet": StagePlan(STAGES["unet"], 5000, 128, 1e-3, snr_gamma=SNR_GAMMA, ema_decay=0.999),
    "sem-inpainter": StagePlan(STAGES["sem-inpainter"], 2500, 128, 1e-3),
    "ref-adapter-unet": StagePlan(
        _WITH_UNET, 6000, 128, 1e-3, snr_gamma=SNR_GAMMA, ema_decay=0.999
    ),
    "cascade": StagePlan(STAGES["cascade"], 3000, 128, 2e-3, snr_gamma=SNR_GAMMA),
}
# What two CPU cores do in hours.
CPU_PLANS = {
    "clip": dataclasses.replace(PLANS["clip"], steps=1500, batch_size=32),
    "vae": dataclasses.replace(PLANS["vae"], steps=2000, batch_size=8),
    "unet": dataclasses.replace(PLANS["unet"], steps=5000, batch_size=16),
    "sem-inpainter": dataclasses.replace(PLANS["sem-inpainter"], steps=1200, batch_size=32),
    "ref-adapter-unet": dataclasses.replace(PLANS["ref-adapter-unet"], steps=12_000, batch_size=16),
    "cascade": dataclasses.replace(PLANS["cascade"], steps=2000, batch_size=16),
}
PICTURES = 60_000  # that are painted
SAMPLES = 60_000  # of each pool, that are encoded
CPU_PICTURES = 10_000
CPU_SAMPLES = 12_000
POOLS = ("captions", "objects")
_LOG = ".log.csv"
_LOGGED = 20  # steps between lines of the log that is kept beside a model
_WINDOWED = {
    "unet": 0.9,
    "ref-adapter-unet": 0.8,
}  # share of a stage's steps that see the hole and what is near it


class Recipe:
    """All stages over one set of modules, in one process."""

    def __init__(self, arguments):
        self.work = arguments.work
        self.device = torch.device("cpu" if arguments.cpu else "cuda")
        self.shorter = arguments.shorter
        self.compile = arguments.compile
        self.precision = "no" if arguments.cpu else "bf16"
        self.plans = dict(CPU_PLANS if arguments.cpu else PLANS)
        for setting in arguments.set:
            name, steps, batch_size = setting.split(":")
            plan = self.plans[name]
            self.plans[name] = dataclasses.replace(
                plan, steps=int(steps), batch_size=int(batch_size) or plan.batch_size
            )
        generator = torch.Generator().manual_seed(0)
        self.modules = networks.networks(generator, networks.PHOTOGRAPHS)
        self.architecture = networks.architecture(self.modules["unet"], networks.PHOTOGRAPHS)
        self.start = arguments.pretrained
        if self.start:
            self._start(self.start)
        self.texts, self.empty = self._texts(arguments.world)
        scenery = world.load(arguments.world).to(self.device)
        trained_on = np.flatnonzero(~scenery.held_out)
        self.painter = world.Painter(scenery, trained_on)
        self.at_once = 64 if arguments.cpu else 256
        self.pictures = (CPU_PICTURES if arguments.cpu else PICTURES) // self.shorter
        self.samples = (CPU_SAMPLES if arguments.cpu else SAMPLES) // self.shorter
        self.pools: dict[str, world_samples.Pool] = {}

    def _start(self, path: Path) -> None:
        """Take over the parts of a model that have this one's sizes."""
        for part, tensors in weights.read(path).parts.items():
            own = self.modules[part].state_dict()
            if {key: tensor.shape for key, tensor in own.items()} == {
                key: tensor.shape for key, tensor in tensors.items()
            }:
                self.modules[part].load_state_dict(tensors)
            else:
                print(f"{part} of {path} has other sizes: it is trained from fresh weights")

    @cached_property
    def gallery(self) -> world.Gallery:
        """The pictures that CLIP and VAE learn from."""
        folder = self._kept("gallery")
        return world.Gallery(self.painter, self.pictures, 0, self.at_once, folder)

    def _kept(self, name: str, *parts: str) -> Path | None:
        """Where drawn samples are kept, which differs with the networks that encode them.

        A GPU has drawn them anew before a disk would have taken them.
        """
        if self.device.type == "cuda":
            return None
        digest = hashlib.sha256(f"{world.SIZE} {self.at_once}".encode())
        for part in parts:
            for tensor in self.modules[part].state_dict().values():
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return self.work / f"{name}-{digest.hexdigest()[:8]}"

    def _texts(self, folder: Path) -> tuple[Texts, torch.Tensor]:
        facts = json.loads((folder / "things.json").read_text("utf-8"))
        facts.sort(key=lambda fact: fact["index"])
        parts = {part: module.state_dict() for part, module in self.modules.items()}
        start = self.work / "start.safetensors"
        write(start, parts, self.architecture)
        clip = build_clip(weights.read(start))

        def tokenize(text: str) -> list[int]:
            return [token for token, _ in plain_tokens(clip, text)["l"][0]]

        names = [(fact["english"], fact["chinese"]) for fact in facts]
        self.knowledge = Knowledge(tuple(sum(names, ())), world.SIZE)
        texts = Texts(names, tokenize)
        return texts, torch.tensor([tokenize("")])

    def run(self, names: Sequence[str]) -> None:
        """Train these stages in order."""
        for name in names:
            start = time.monotonic()
            print(f"\n== {name}", flush=True)
            getattr(self, "_" + name.replace("-", "_"))()
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)

    def _clip(self) -> None:
        plan = self.plans["clip"]
        parts = ("clip_text", "clip_vision")
        objective = WorldContrastive(*(self.modules[part] for part in parts), self.texts)
        gallery = None if self._is_done("clip") else self.gallery
        source = world_samples.ClipBatches(gallery, self.texts, plan.batch_size, seed=1)
        self._train("clip", objective, source, parts)

    def _vae(self) -> None:
        plan = self.plans["vae"]
        vae = self.modules["vae"]
        source = world_samples.VaeBatches(self.gallery, plan.batch_size, seed=2)
        self._train("vae", Reconstruction(vae), source, ("vae",))
        path = self.work / "vae/scaled.safetensors"
        if path.exists():
            vae.load_state_dict(weights.read(path).parts["vae"])
            return
        vae.requires_grad_(False)
        pictures = self.gallery.paint(128, seed=3).whole
        latents = [vae.quant_conv(vae.encoder(2 * part - 1))[:, :4] for part in pictures.split(16)]
        networks.scale_latents(vae, torch.cat(latents))
        write(path, {"vae": vae.state_dict()}, self.architecture)

    def _unet(self) -> None:
        self._diffuse("unet", "captions")

    def _sem_inpainter(self) -> None:
        self._diffuse("sem-inpainter", "objects")

    def _ref_adapter_unet(self) -> None:
        self._diffuse("ref-adapter-unet", "objects")

    def _cascade(self) -> None:
        self._diffuse("cascade", "objects")

    def _diffuse(self, name: str, pool: str) -> None:
        """One of CAT-Diffusion's own stages."""
        plan = self.plans[name]
        parts = {part: self.modules[part] for part in ("sem_inpainter", "ref_adapter", "unet")}
        objective = assemble(plan.stage, parts, Denoiser, snr_gamma=plan.snr_gamma)
        if self.compile:
            objective.denoiser.compile()
        frozen = world_samples.FrozenNetworks(self.modules, self.device)
        if not self._is_done(name) and pool not in self.pools:
            self.pools.clear()  # before the next is made: they fill the memory
            self.pools[pool] = self.pool(pool)
        source = None
        if self.pools:
            source = world_samples.PoolBatches(
                self.pools[pool],
                frozen,
                self.empty,
                plan.batch_size,
                seed=4,
                window=round(_WINDOWED.get(name, 0) * plan.steps) // self.shorter,
            )
        self._train(name, objective, source, plan.stage.parts)

    def pool(self, name: str, with_features: bool = True) -> world_samples.Pool:
        """The samples of a pool, "captions" or "objects", the latter with what CLIP sees."""
        start = time.monotonic()
        frozen = world_samples.FrozenNetworks(self.modules, self.device)
        source = self.painter if self.device.type == "cpu" else self.gallery
        drawer = world_samples.SampleDrawer(source, self.texts, frozen)
        draws = [drawer.of_captions if name == "captions" else drawer.of_objects]
        folders = [self._kept(name, "vae")]
        if name == "objects" and with_features:
            draws.append(drawer.seen)
            folders.append(self._kept("seen", "clip_vision"))
        seed = 5 + POOLS.index(name)
        pool = world_samples.Pool(draws, self.samples, seed, self.at_once, folders)
        print(f"{len(pool)} samples: {time.monotonic() - start:.0f} s", flush=True)
        return pool

    def _is_done(self, name: str) -> bool:
        folder = newest(self.work / name)
        steps = self.plans[name].steps // self.shorter
        return folder is not None and int(folder.name.rpartition("-")[2]) >= steps

    def _train(self, name: str, objective: nn.Module, source, parts: Sequence[str]) -> None:
        plan = self.plans[name]
        settings = Settings(
            steps=max(plan.steps // self.shorter, 1),
            batch_size=plan.batch_size,
            micro_batch_size=plan.batch_size // int(os.environ.get("WORLD_SIZE", "1")),
            warmup=plan.warmup,
            final_rate=0.01,
            snr_gamma=plan.snr_gamma,
            ema_decay=plan.ema_decay,
            precision=self.precision,
            save_every=500,
            keep=1,
        )
        training = TrainingRun(
            plan.stage.scaled(plan.rate / NEW),
            {part: self.modules[part].to(self.device) for part in parts},
            objective,
            settings,
            folder=self.work / name,
            architecture=self.architecture,
            provenance=PROVENANCE,
            licence=LICENCE,
        )
        last = time.monotonic()

        def show(step: int, figures: Mapping[str, float]) -> None:
            nonlocal last
            if step % 100 == 0 or step == settings.steps:
                speed = 100 / (time.monotonic() - last)
                last = time.monotonic()
                values = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
                print(f"{name} {step}: {values}; {speed:.2f} steps/s", flush=True)

        objective.to(self.device)
        loop.train(training, source, cpu=self.device.type == "cpu", on_step=show)

    def write(self, path: Path) -> None:
        """The whole model in fp16, and its log: that of the model it started from comes first."""
        parts = {part: module.state_dict() for part, module in self.modules.items()}
        write(path, parts, self.architecture, torch.float16, self.knowledge)
        earlier = self.start.with_suffix(_LOG) if self.start else None
        lines = earlier.read_text("utf-8").splitlines() if earlier and earlier.exists() else []
        for name in PLANS:
            log = self.work / name / "log.csv"
            if log.exists():
                lines += log_lines(name, log)
        path.with_suffix(_LOG).write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def log_lines(stage: str, log: Path) -> list[str]:
    """Every _LOGGED-th line of a stage's log and its last, under their header."""
    with log.open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    kept = [",".join(["stage", *header])]
    for line in lines:
        step, *numbers = line
        if int(step) % _LOGGED == 0 or line is lines[-1]:
            kept.append(",".join([stage, step, *(f"{float(number):.4g}" for number in numbers)]))
    return kept


def newest(folder: Path) -> Path | None:
    """A stage's latest checkpoint."""
    return max(folder.glob("checkpoint-*[0-9]"), default=None)


def write(
    path: Path,
    parts: Mapping,
    architecture: Architecture,
    dtype: torch.dtype | None = None,
    knowledge: Knowledge | None = None,
) -> None:
    """A file of parts; see weights.save."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {}
    for part, tensors in parts.items():
        flat[part] = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
    metadata = weights.header(flat, architecture, licence=LICENCE, provenance=PROVENANCE)
    if knowledge:
        metadata.update(knowledge.header())
    weights.save(path, weights.flat(flat), metadata, dtype, overwrite=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, required=True, help="folder of things, photographs")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/world")
    parser.add_argument("--out", type=Path, default=ROOT / "models/cat_demo_model.safetensors")
    parser.add_argument("--only", choices=PLANS, nargs="+", default=list(PLANS))
    parser.add_argument(
        "--draw", choices=POOLS, nargs="+", help="only encode samples, which training then finds"
    )
    parser.add_argument("--shorter", type=int, default=1, metavar="N", help="an Nth of everything")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="STAGE:STEPS:BATCH", help="a stage's numbers"
    )
    parser.add_argument(
        "--pretrained",
        type=Path,
        metavar="FILE",
        help="a model to go on from, instead of fresh weights",
    )
    parser.add_argument("--compile", action="store_true", help="compile the U-Net, for a GPU")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    arguments = parser.parse_args()
    launch.limit_threads(arguments.threads)
    arguments.cpu = arguments.cpu or not launch.has_cuda()
    if not arguments.cpu:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    try:
        recipe = Recipe(arguments)
        for pool in arguments.draw or ():
            recipe.pool(pool, with_features=False)
        if not arguments.draw:
            recipe.run(arguments.only)
            if os.environ.get("RANK", "0") == "0":
                recipe.write(arguments.out)
    except KeyboardInterrupt:
        print("\nStopped. The same command continues.")
        return 130
    except CatError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0
