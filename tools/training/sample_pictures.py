"""Pictures of what a run has learned so far, on a few fixed samples."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import nn

from cat_diffusion.cat_core.data import masks
from cat_diffusion.cat_core.data.manifest import Record
from cat_diffusion.cat_core.errors import CatError
from cat_diffusion.cat_core.features import masked_cosine
from cat_diffusion.cat_core.files import replacing
from cat_diffusion.cat_core.models.unet_lora import UnetLora
from cat_diffusion.cat_core.pictures import plots
from cat_diffusion.cat_core.pictures.tensors import channels_last, to_picture
from cat_diffusion.cat_core.training.encoding import Preparation, encode, prepare, stack
from cat_diffusion.cat_core.training.stages import Stage
from cat_diffusion.cat_core.training.stores import FreshSamples, chance_of
from cat_diffusion.cat_core.weights import Checkpoint
from cat_diffusion.nodes.apply_ref_adapter import apply_ref_adapter
from cat_diffusion.nodes.conditioning import inpaint_conditioning
from cat_diffusion.nodes.host import memory
from cat_diffusion.nodes.host.build import build_cat_model, build_unet
from cat_diffusion.nodes.host.clip import plain_tokens
from cat_diffusion.nodes.host.encoders import HostEncoders
from cat_diffusion.nodes.host.sampling import decode, ksample
from cat_diffusion.nodes.visual_prompt import encode_visual_prompt, predict

COUNT = 4  # samples on a sheet
STEPS = 20
CFG = 7.5


class Shown(NamedTuple):
    """A sample of the sheet: its record, picture and hole, both in the run's size."""

    record: Record
    picture: Image.Image
    hole: Image.Image

    @property
    def with_hole(self) -> Image.Image:
        """The picture with its hole grey, as CLIP sees it."""
        grey = Image.new("RGB", self.picture.size, (127, 127, 127))
        return Image.composite(grey, self.picture, self.hole)

    @property
    def text(self) -> str:
        return self.record.caption or self.record.label


@dataclass
class SamplePictures:
    """Draws step-00001000.png: for stage 1 the similarity of features, else inpainted pictures."""

    stage: Stage
    file: Checkpoint  # what the run started from, with all parts described
    modules: Mapping[str, nn.Module]  # only those that the stage trains have changed
    encoders: HostEncoders
    fresh: FreshSamples  # the run's records and picture size
    folder: Path
    seed: int

    def draw(self, step: int) -> None:
        """Write the sheet of a step; what goes wrong is printed and does not end the run."""
        try:
            with torch.inference_mode():
                sheet = self._inpainted() if self.stage.diffusion else self._similarities()
            with replacing(self.folder / f"step-{step:08d}.png") as partial:
                sheet.save(partial, "PNG")
        except (OSError, RuntimeError, ValueError, CatError) as error:
            print(f"\nNo sample pictures at step {step}: {error}", flush=True)
        memory.clear_memory()

    @cached_property
    def _samples(self) -> list[Shown]:
        """The first usable records with an object."""
        size = (self.fresh.size, self.fresh.size)
        samples = []
        for record in self.fresh.records:
            if not record.hole:
                continue
            try:
                picture, mask = masks.load(record, self.fresh.folder)
                hole = masks.training_mask(mask, "segment")
            except masks.SampleError:
                continue
            picture = picture.resize(size, Image.Resampling.BICUBIC)
            hole = hole.resize(size, Image.Resampling.BICUBIC)
            samples.append(Shown(record, picture, hole))
            if len(samples) == COUNT:
                break
        if not samples:
            raise ValueError("no record with an object can be opened")
        return samples

    def _similarities(self) -> Image.Image:
        rows = [self._similarity(sample) for sample in self._samples]
        return plots.sheet(rows, ("picture", "observed", "predicted"))

    def _similarity(self, sample: Shown) -> tuple[str, list[Image.Image]]:
        """A sheet's row: SemInpainter's features of the hole beside those that CLIP observes."""
        module = self.modules["sem_inpainter"]
        device = next(module.parameters()).device
        fresh = self.fresh
        how = Preparation("distillation")  # squashed, as inference sees it
        prepared = prepare(sample.record, fresh.folder, "segment", how, chance_of("sheet"))
        encoded = encode([sample.record], stack([prepared]), self.encoders, how)
        batch = {key: value.to(device) for key, value in encoded.items()}
        observed = batch["patches"]
        teacher = batch["teacher_patches"]
        mask = batch["patch_mask"]
        predicted = module(observed, batch["image"], batch["text"], mask).patches

        texts = []
        squares = []
        for name, patches in (("observed", observed), ("predicted", predicted)):
            cosine = masked_cosine(patches, teacher, mask.flatten(1).float()).item()
            texts.append(f"{cosine:.3f} {name}")
            squares.append(plots.similarity(patches[0], teacher[0]))
        title = f"{sample.record.label}: cosine in the hole {', '.join(texts)}"
        return title, [sample.with_hole, *squares]

    def _inpainted(self) -> Image.Image:
        file = self._so_far()
        cat_model = build_cat_model(file)
        learns = {"unet", "unet_lora"} & set(self.stage.parts)
        model = build_unet(file) if learns else self.encoders.model
        rows = []
        for sample in self._samples:
            inpainted = self._inpaint(model, cat_model, sample)
            rows.append((sample.text, [sample.with_hole, inpainted, sample.picture]))
        return plots.sheet(rows, ("picture", "inpainted", "original"))

    def _so_far(self) -> Checkpoint:
        """All parts as they are now; those in training as copies."""
        parts = dict(self.file.parts)
        for part, module in self.modules.items():
            tensors = module.state_dict()
            if part in self.stage.parts:
                parts[part] = {key: value.cpu().clone() for key, value in tensors.items()}
            elif part != "unet":  # the file's own is in the host's precision
                parts[part] = tensors
        lora = self.modules.get("unet_lora")
        if isinstance(lora, UnetLora):
            parts["unet"] = lora.merged(parts["unet"])
            del parts["unet_lora"]
        return dataclasses.replace(self.file, parts=parts)

    def _inpaint(self, model, cat_model, sample: Shown) -> Image.Image:
        """Sample a picture from noise alone, with the visual prompt that the stage trains with."""
        clip = self.encoders.clip
        vae = self.encoders.vae
        image = channels_last([sample.picture])
        mask = channels_last([sample.hole])
        if self.stage.prompt:
            prompt = self._visual_prompt(cat_model, image, mask, sample.record.label)
            model = apply_ref_adapter(model, cat_model, prompt)
        positive, negative, latent = inpaint_conditioning(
            clip.encode_from_tokens_scheduled(plain_tokens(clip, sample.text)),
            clip.encode_from_tokens_scheduled(plain_tokens(clip, "")),
            vae,
            image,
            mask,
        )
        # The photo's own latent still holds the object.
        empty = {**latent, "samples": torch.zeros_like(latent["samples"])}
        sampled = ksample(model, self.seed, STEPS, CFG, positive, negative, empty)
        (inpainted,) = decode(vae, sampled)
        return to_picture(inpainted)

    def _visual_prompt(self, cat_model, image: torch.Tensor, mask: torch.Tensor, label: str):
        vision = self.encoders.clip_vision
        if self.stage.prompt == "predicted":
            return predict(cat_model, vision, self.encoders.clip, image, mask, label)
        if self.stage.prompt == "observed":
            return encode_visual_prompt(vision, image, mask)
        return encode_visual_prompt(vision, image)
