"""What a stage of training works with: its weights, its objective, encoded samples, batches."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from cat_diffusion.cat_core import weights
from cat_diffusion.cat_core.config import HEAD_WIDTH, RefAdapterConfig, SemInpainterConfig
from cat_diffusion.cat_core.data.manifest_records import ManifestRecords
from cat_diffusion.cat_core.training import identity, start
from cat_diffusion.cat_core.training.assemble import assemble
from cat_diffusion.cat_core.training.batches import Batches
from cat_diffusion.cat_core.training.encoding import Preparation
from cat_diffusion.cat_core.training.mixture import Mixture
from cat_diffusion.cat_core.training.processes import Alone, Processes
from cat_diffusion.cat_core.training.settings import Settings
from cat_diffusion.cat_core.training.shards import ShardedSamples
from cat_diffusion.cat_core.training.stages import Stage
from cat_diffusion.cat_core.training.stores import FreshSamples, SampleStore
from cat_diffusion.cat_core.weights import Checkpoint, trained_stages
from cat_diffusion.nodes.host.build import build_clip, build_clip_vision, build_unet, build_vae
from cat_diffusion.nodes.host.denoiser import Denoiser, trainable_unet
from cat_diffusion.nodes.host.encoders import HostEncoders
from cat_diffusion.nodes.host.unet import vae_cell

LORA_RANK = 16  # what people give LoRAs of an SD 1.5


def frozen_parts(objective: str) -> list[str]:
    """The parts that encode samples for an objective."""
    parts = ["clip_text", "clip_vision"]
    if objective == "diffusion":
        parts.append("vae")
    return parts


def load(paths: Sequence[Path], diffusion: bool) -> Checkpoint:
    """Everything that a stage starts from; the CAT parts that the files lack are described."""
    files = [weights.read(path) for path in paths]
    file = weights.merge(files)
    stages = []
    for part_file in files:
        stages += trained_stages.of_header(part_file.metadata)
    metadata = {**file.metadata, **trained_stages.header(stages)}
    needed = ["clip_text", "clip_vision"]
    if diffusion:
        needed += ["unet", "vae"]
    file.require(*needed)
    architecture = file.architecture
    if architecture.sem_inpainter is None:
        config = _sem_inpainter_config(file)
        architecture = dataclasses.replace(architecture, sem_inpainter=config)
    if architecture.ref_adapter is None and "unet" in file.parts:
        config = _ref_adapter_config(file)
        architecture = dataclasses.replace(architecture, ref_adapter=config)
    return dataclasses.replace(file, architecture=architecture, metadata=metadata)


def build(
    stage: Stage,
    file: Checkpoint,
    seed: int = 0,
    *,
    masked: bool = False,
    checkpointing: bool = False,
    snr_gamma: float = 0.0,
    lora_rank: int = LORA_RANK,
) -> tuple[dict[str, nn.Module], nn.Module]:
    """The modules that a stage has a use for, by part, and its objective over them."""
    modules = start.trainable_parts(file.architecture, file.parts, seed)
    denoiser = partial(Denoiser, checkpointing=checkpointing)
    if stage.diffusion:
        modules["unet"] = trainable_unet(file)
    if "unet_lora" in stage.parts:
        lora = start.unet_lora(file.parts, lora_rank, seed)
        lora.attach(modules["unet"])
        modules["unet_lora"] = lora
        denoiser = partial(denoiser, unet_lora=lora)
    return modules, assemble(stage, modules, denoiser, masked=masked, snr_gamma=snr_gamma)


def encoded_samples(
    file: Checkpoint,
    objective: str,
    data: Path,
    *,
    split: str = "train",
    size: int = 512,
    cache: Path | None = None,
    processes: Processes | None = None,
    how: Preparation | None = None,
    records: ManifestRecords | None = None,
    most: int | None = None,
    cache_dtype: str = "fp16",
) -> tuple[HostEncoders, SampleStore]:
    """The frozen networks, and the samples that they encode; a cache is filled first.

    Args:
        processes: those of the run, which fill the cache together; None means this one alone.
        how: pictures, flip and captions; None squashes pictures.
        records: those of `data`, where they have been read.
        most: no more than so many records; None means all.
        cache_dtype: one of stages.CACHE_DTYPES.
    """
    how = how or Preparation()
    records = records or ManifestRecords([data], split)
    vae = None
    unet = None
    cell = 8
    with torch.inference_mode():
        clip = build_clip(file)
        vision = build_clip_vision(file)
        if objective == "diffusion":
            vae = build_vae(file)
            unet = build_unet(file)
            cell = vae_cell(vae)
    encoders = HostEncoders(vision, clip, vae, unet)
    fresh = FreshSamples(
        records if most is None else records[:most],
        records.folder,
        encoders,
        objective=objective,
        size=size,
        cell=cell,
        pictures=how.pictures,
        flip=how.flip,
        caption_share=how.caption_share,
        reads=how.reads,
    )
    if cache is None:
        return encoders, fresh
    networks = identity.of_parts(file, frozen_parts(objective))
    store = ShardedSamples(cache, fresh, networks, cache_dtype)
    share = len(store.share(processes or Alone()))
    with torch.inference_mode(), tqdm(total=share, desc="Encoding", unit="shard") as bar:
        store.fill(on_shard=bar.update, processes=processes)
    return encoders, store


def batches_for(
    stage: Stage,
    encoders: HostEncoders,
    store: SampleStore,
    settings: Settings,
    workers: int = 0,
    mixture: Mixture | None = None,
) -> Batches:
    """A run's batches, with the empty text for the dropped samples of diffusion."""
    with torch.inference_mode():
        empty_context = encoders.context([""]) if stage.diffusion else None
    return Batches(store, settings.batch_size, settings.seed, empty_context, workers, mixture)


def _sem_inpainter_config(file: Checkpoint) -> SemInpainterConfig:
    """A SemInpainter to be made anew, as wide and deep as the file's CLIP vision model."""
    vision = file.parts["clip_vision"]
    prefix = "vision_model.encoder.layers."
    width = _width(vision["vision_model.post_layernorm.weight"])
    layers = {key.split(".")[3] for key in vision if key.startswith(prefix)}
    return start.sem_inpainter_config(
        width=width,
        layers=len(layers),
        heads=file.architecture.clip_vision_num_heads or max(width // HEAD_WIDTH, 1),
        text_size=_width(file.parts["clip_text"]["text_model.final_layer_norm.weight"]),
    )


def _ref_adapter_config(file: Checkpoint) -> RefAdapterConfig:
    """A RefAdapter to be made anew, with one adapter for each transformer block of the U-Net."""
    visual_size = _width(file.parts["clip_vision"]["vision_model.post_layernorm.weight"])
    heads = file.architecture.unet_num_heads
    return start.ref_adapter_config(file.parts["unet"], heads, visual_size)


def _width(norm: torch.Tensor) -> int:
    return norm.shape[0]
