"""Pictures of what a run has learned so far, on a few fixed samples; for tools/train.py --samples-every."""

import dataclasses
import os
from pathlib import Path

import comfy.utils
import numpy as np
import torch
from PIL import Image

from cat_diffusion.cat_core.data import masks
from cat_diffusion.cat_core.pictures import plots
from cat_diffusion.cat_core.training import samples
from cat_diffusion.cat_core.training.objectives import masked_cosine
from cat_diffusion.nodes.apply_ref_adapter import apply_ref_adapter
from cat_diffusion.nodes.conditioning import inpaint_conditioning
from cat_diffusion.nodes.host import memory
from cat_diffusion.nodes.host.build import build_cat_model, build_unet
from cat_diffusion.nodes.host.clip import plain_tokens
from cat_diffusion.nodes.host.encoders import HostEncoders
from cat_diffusion.nodes.visual_prompt import encode_visual_prompt, predict

COUNT = 4  # samples on a sheet
STEPS, CFG = 20, 7.5


class SamplePictures:
    """Draws RUN/samples/step-00001000.png: similarity of features for stage 1, inpainted pictures for the others.

    Args:
        file: what the run started from, with all parts described.
        modules: the parts in training; only those in the stage's rates have changed.
        encoders: the host's CLIP_VISION, CLIP, VAE and MODEL.
        fresh: the run's records and picture size.
    """

    def __init__(
        self,
        stage,
        file,
        modules,
        encoders: HostEncoders,
        fresh: samples.Fresh,
        run: Path,
        seed: int,
    ):
        self.stage, self.file, self.modules, self.encoders, self.fresh = (
            stage,
            file,
            modules,
            encoders,
            fresh,
        )
        self.folder, self.seed = run / "samples", seed
        self.chosen: list[tuple] | None = None

    def draw(self, step: int) -> None:
        """Write the sheet of a step; what goes wrong is printed and does not end the run."""
        path = self.folder / f"step-{step:08d}.png"
        partial = path.with_suffix(".partial")
        try:
            with torch.inference_mode():
                sheet = (
                    self._inpainted()
                    if self.stage.objective == "diffusion"
                    else self._similarities()
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            sheet.save(partial, "PNG")
            os.replace(partial, path)
        except (OSError, RuntimeError, ValueError) as error:
            print(f"\nNo sample pictures at step {step}: {error}", flush=True)
            partial.unlink(missing_ok=True)
        memory.clear_memory()

    def _samples(self) -> list[tuple]:
        """(record, picture, hole) of the first usable records with an object, in the run's size."""
        if self.chosen is None:
            self.chosen = []
            for record in (record for record in self.fresh.records if record.hole):
                try:
                    picture, mask = masks.load(record, self.fresh.folder)
                except masks.SampleError:
                    continue
                size = (self.fresh.size,) * 2
                hole = masks.training_mask(mask, "segment").resize(size, Image.Resampling.BICUBIC)
                self.chosen.append((record, picture.resize(size, Image.Resampling.BICUBIC), hole))
                if len(self.chosen) == COUNT:
                    break
        if not self.chosen:
            raise ValueError("no record with an object can be opened")
        return self.chosen

    def _similarities(self) -> Image.Image:
        rows, module = [], self.modules["sem_inpainter"]
        device = next(module.parameters()).device
        for record, picture, hole in self._samples():
            prepared = samples.prepare(
                record, self.fresh.folder, "segment", self.fresh.size, self.fresh.cell
            )
            batch = {
                key: value.to(device)
                for key, value in samples.encode(
                    [record], [prepared], self.encoders, "distillation"
                ).items()
            }
            predicted = module(
                batch["patches"], batch["image"], batch["text"], batch["patch_mask"]
            ).patches
            teacher, m = batch["teacher_patches"], batch["patch_mask"].flatten(1).float()
            before, after = (
                masked_cosine(x, teacher, m).item() for x in (batch["patches"], predicted)
            )
            squares = [plots.similarity(x[0], teacher[0]) for x in (batch["patches"], predicted)]
            rows.append(
                (
                    f"{record.label}: cosine in the hole {before:.3f} observed, {after:.3f} predicted",
                    [_holed(picture, hole), *squares],
                )
            )
        return plots.sheet(rows, ("picture", "observed", "predicted"))

    def _inpainted(self) -> Image.Image:
        trained = {
            part: {
                key: tensor.detach().cpu().clone()
                for key, tensor in self.modules[part].state_dict().items()
            }
            for part, _ in self.stage.rates
        }
        rest = {
            part: module.state_dict()
            for part, module in self.modules.items()
            if part not in trained and part != "unet"
        }
        file = dataclasses.replace(self.file, parts={**self.file.parts, **rest, **trained})
        cat_model = build_cat_model(file)
        model = build_unet(file) if "unet" in trained else self.encoders.model
        rows = [
            (
                record.caption or record.label,
                [
                    _holed(picture, hole),
                    self._inpaint(model, cat_model, record, picture, hole),
                    picture,
                ],
            )
            for record, picture, hole in self._samples()
        ]
        return plots.sheet(rows, ("picture", "inpainted", "original"))

    def _inpaint(self, model, cat_model, record, picture, hole) -> Image.Image:
        """The pack's own nodes and the host's own sampler, from noise alone; visual prompt as in training."""
        import nodes  # the host's

        clip, vision, vae = self.encoders.clip, self.encoders.clip_vision, self.encoders.vae
        image, mask = (
            torch.from_numpy(np.array(x, np.float32) / 255)[None] for x in (picture, hole)
        )
        if self.stage.prompt == "predicted":
            prompt = predict(cat_model, vision, clip, image, mask, record.label)
        elif self.stage.prompt:
            prompt = encode_visual_prompt(
                vision, image, mask if self.stage.prompt == "observed" else None
            )
        texts = (
            clip.encode_from_tokens_scheduled(plain_tokens(clip, text))
            for text in (record.caption or record.label, "")
        )
        positive, negative, latent = inpaint_conditioning(*texts, vae, image, mask)
        if self.stage.prompt:
            model = apply_ref_adapter(model, cat_model, prompt)
        latent["samples"] = torch.zeros_like(
            latent["samples"]
        )  # the photo's own still holds the object
        shown, comfy.utils.PROGRESS_BAR_ENABLED = comfy.utils.PROGRESS_BAR_ENABLED, False
        try:
            (latent,) = nodes.common_ksampler(
                model, self.seed, STEPS, CFG, "ddim", "ddim_uniform", positive, negative, latent
            )
        finally:
            comfy.utils.PROGRESS_BAR_ENABLED = shown
        pixels = (
            vae.decode(latent["samples"])[0]
            .float()
            .cpu()
            .clamp(0, 1)
            .mul(255)
            .round()
            .to(torch.uint8)
        )
        return Image.fromarray(pixels.numpy())


def _holed(picture: Image.Image, hole: Image.Image) -> Image.Image:
    return Image.composite(Image.new("RGB", picture.size, (127, 127, 127)), picture, hole)
