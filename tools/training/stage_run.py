"""One stage of training, as tools/train.py runs it: load, build, encode, train."""

import dataclasses
import gc
import sys
from pathlib import Path

import torch

from cat_diffusion.cat_core import weights
from cat_diffusion.cat_core.data import manifest
from cat_diffusion.cat_core.errors import CatError
from cat_diffusion.cat_core.training import loop, samples, start
from cat_diffusion.cat_core.training.objectives import (
    Diffusion,
    Distillation,
    stable_diffusion_schedule,
)
from cat_diffusion.cat_core.training.stages import STAGES
from cat_diffusion.nodes.host import memory
from cat_diffusion.nodes.host.build import build_clip, build_clip_vision, build_unet, build_vae
from cat_diffusion.nodes.host.denoiser import Denoiser, trainable_unet
from cat_diffusion.nodes.host.encoders import HostEncoders
from cat_diffusion.nodes.host.unet import vae_cell

from .sample_pictures import SamplePictures


def command(parser, arguments) -> int:
    """Run the stage that the arguments name; returns the exit code."""
    if arguments.stage not in STAGES:
        parser.error(f"unknown stage {arguments.stage}; choose from {', '.join(STAGES)}")
    try:
        print(f"\nCAT weights: {run(arguments)}")
    except KeyboardInterrupt:
        print(f"\nStopped. The same command continues from {arguments.run}.")
        return 130
    except CatError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


def run(arguments, stage=None) -> Path:
    """Load, build, cache, train; `stage` with rates of its own replaces the one that the arguments name."""

    stage = stage or STAGES[arguments.stage].scaled(arguments.rates)
    diffusion = stage.objective == "diffusion"
    file = load(arguments.base, diffusion)
    modules = start.trainable_parts(file.architecture, file.parts, arguments.seed)
    encoders, store = encoded_samples(
        file, stage.objective, arguments.data, arguments.split, arguments.size, arguments.cache
    )
    fresh = store.fresh if arguments.cache else store
    with torch.inference_mode():
        empty = encoders.context([""]) if diffusion else None
    source = samples.Source(store, arguments.batch_size, arguments.seed, empty)
    architecture = file.architecture
    if diffusion:
        modules["unet"] = trainable_unet(file)
        denoiser = Denoiser(
            modules["unet"],
            modules["ref_adapter"] if stage.prompt else None,
            arguments.checkpointing,
        )
        objective = Diffusion(
            denoiser,
            stable_diffusion_schedule(),
            modules["sem_inpainter"] if stage.prompt == "predicted" else None,
            stage.prompt == "observed",
        )
    else:
        objective = Distillation(modules["sem_inpainter"], arguments.masked)
    settings = loop.Settings(
        arguments.steps,
        arguments.batch_size,
        arguments.micro_batch_size,
        arguments.warmup,
        final_rate=arguments.final_rate,
        precision=arguments.precision,
        seed=arguments.seed,
        save_every=arguments.save_every,
    )

    pictures = (
        SamplePictures(stage, file, modules, encoders, fresh, arguments.run, arguments.seed)
        if arguments.samples_every
        else None
    )
    if (
        arguments.cache and not pictures
    ):  # the frozen networks have done their work: their memory is wanted
        file = encoders = fresh.encoders = None
        memory.clear_memory()
        gc.collect()

    def on_step(step, figures):
        if pictures and step % arguments.samples_every == 0:
            pictures.draw(step)

    def encoded(step, positions):
        with torch.no_grad():
            return {
                key: value.clone() for key, value in source(step, positions).items()
            }  # free of inference mode

    try:
        return loop.train(
            stage,
            objective,
            modules,
            encoded,
            arguments.run,
            settings,
            architecture,
            provenance=f"trained on {arguments.data.name}",
            licence=arguments.licence,
            cpu=arguments.cpu,
            on_step=on_step,
        )
    finally:
        if fresh.report.skipped:
            print(f"\n{fresh.report}")


def load(paths, diffusion: bool):
    """Everything that a stage starts from, as one Checkpoint that describes the CAT parts it lacks."""

    file = weights.merge([weights.read(path) for path in paths])
    file.require("clip_text", "clip_vision", *(("unet", "vae") if diffusion else ()))
    return dataclasses.replace(file, architecture=with_cat_parts(file.parts, file.architecture))


def encoded_samples(file, objective: str, data: Path, split: str, size: int, cache: Path | None):
    """The frozen networks, and the samples that they encode; a cache is filled first."""

    diffusion = objective == "diffusion"
    with torch.inference_mode():
        clip, vision = build_clip(file), build_clip_vision(file)
        vae, model = (build_vae(file), build_unet(file)) if diffusion else (None, None)
    encoders = HostEncoders(vision, clip, vae, model)
    store = samples.Fresh(
        manifest.read(data, split),
        data.parent,
        encoders,
        objective,
        size,
        vae_cell(vae) if diffusion else 8,
    )
    if cache:
        store = samples.Shards(cache, store)
        with torch.inference_mode():
            store.fill(
                lambda done, total: print(f"\rEncoded {done} of {total} shards", end="", flush=True)
            )
        print()
    return encoders, store


def with_cat_parts(parts, architecture):
    """Describe the CAT parts that will be made anew: as wide as CLIP, one adapter a transformer block."""

    vision, text = parts["clip_vision"], parts["clip_text"]
    width = vision["vision_model.post_layernorm.weight"].shape[0]
    layers = len(
        {key.split(".")[3] for key in vision if key.startswith("vision_model.encoder.layers.")}
    )
    if architecture.sem_inpainter is None:
        heads = architecture.clip_vision_num_heads or max(width // 64, 1)
        text_size = text["text_model.final_layer_norm.weight"].shape[0]
        architecture = dataclasses.replace(
            architecture, sem_inpainter=start.sem_inpainter_config(width, layers, heads, text_size)
        )
    if architecture.ref_adapter is None and "unet" in parts:
        adapter = start.ref_adapter_config(parts["unet"], architecture.unet_num_heads, width)
        architecture = dataclasses.replace(architecture, ref_adapter=adapter)
    return architecture
