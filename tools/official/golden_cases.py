"""This pack and the official implementation on the same inputs, in the real ComfyUI."""

import hashlib
import json
from pathlib import Path

import comfy.sample
import comfy.samplers
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from cat_diffusion.cat_core import features, preprocess, weights
from cat_diffusion.cat_core.config import Architecture, RefAdapterConfig, SemInpainterConfig
from cat_diffusion.cat_core.features import VisualPrompt
from cat_diffusion.nodes.apply_ref_adapter import apply_ref_adapter
from cat_diffusion.nodes.conditioning import official_sigmas
from cat_diffusion.nodes.host.build import build_cat_model, build_unet

BOUND = 1e-5  # of the largest value, fp32


def command(parser, goldens: Path) -> int:
    """Print a line a case; returns 1 if an error exceeds its bound."""
    try:
        failures = sum(_report(*line) for line in Cases(goldens).run())
    except FileNotFoundError as error:
        parser.error(f"{goldens} is incomplete: {error}")
    print(
        f"{failures} of the cases exceed their bound."
        if failures
        else "All cases are within their bounds."
    )
    return int(failures > 0)


def _report(name: str, absolute: float, relative: float, bound: float) -> bool:
    ok = relative <= bound  # False for NaN
    print(
        f"{'ok  ' if ok else 'FAIL'} {name:<44} abs {absolute:.2e}  rel {relative:.2e}  bound {bound:.0e}",
        flush=True,
    )
    return not ok


class Cases:
    """All cases of one golden folder; `run` yields (name, absolute error, relative error, bound)."""

    def __init__(self, folder: Path):

        self.folder, self.load = folder, load_file
        self.index = json.loads((folder / "index.json").read_text())

    def run(self):

        for cases in (self.preprocessing, self.sem_inpainter, self.unet, self.trajectory):
            with torch.inference_mode():
                yield from cases()

    def preprocessing(self):
        """Bit-exact: the whole array's sha256 where the index has one, else the stored samples."""

        stored = self.load(self.folder / "preproc.safetensors")
        for name, facts in self.index["files"]["preproc.safetensors"]["images"].items():
            number = name.removeprefix("img")
            pictures = [
                np.array(Image.open(self.folder / "preproc" / f"{kind}{number}.png").convert(mode))
                for kind, mode in (("img", "RGB"), ("mask", "L"))
            ]
            image = torch.from_numpy(pictures[0]).permute(2, 0, 1)[None].float() / 255
            mask = torch.from_numpy(pictures[1])[None, None].float() / 255
            seen = preprocess.clip_input(image, mask)
            image_512, mask_512 = (
                preprocess.resize(image, 512, 512),
                preprocess.resize(mask, 512, 512),
            )
            masked = preprocess.vae_input(image_512 / 255.0, mask_512 / 255.0)
            for key, array in {
                "image_512_u8": image_512,
                "mask_512_u8": mask_512,
                "image_224_u8": seen.image,
                "masked_image_224_u8": seen.masked_image,
                "masked_image_512_f64": masked,
                "masked_image_512_f32": masked.float(),
                "jpg_f32": preprocess.vae_input(image_512 / 255.0).float(),
            }.items():
                array = array[0].permute(1, 2, 0).squeeze(2).contiguous().numpy()
                same = hashlib.sha256(array.tobytes()).hexdigest() == facts["sha256"][key]
                yield (
                    f"preprocessing {name} {key} sha256",
                    *((0.0, 0.0) if same else (float("nan"),) * 2),
                    0.0,
                )
            latent = preprocess.latent_mask(mask_512 / 255.0, 64, 64)
            for key, found in {
                "mask_16": seen.patch_mask.flatten(),
                "mask_64": latent[0, 0],
            }.items():
                yield f"preprocessing {name} {key}", *_error(found, stored[f"{name}.{key}"]), 0.0
            pixels = preprocess.clip_normalise(seen.masked_image)[0][:, ::4, ::4]
            yield (
                f"preprocessing {name} clip_pixel_values",
                *_error(pixels, stored[f"{name}.clip_pixel_values_sub4"]),
                BOUND,
            )

    def sem_inpainter(self):
        """In the core with torch's own operations, and in the host with the host's."""

        file = self._file("fusion_tiny.safetensors")
        tensors = file.parts["sem_inpainter"]
        core = weights.cat_modules(file.architecture)["sem_inpainter"]
        core.load_state_dict(tensors)
        hosted = build_cat_model(file).sem_inpainter.model
        for case, golden in self._cases("fusion_cases.safetensors"):
            for where, model in (("core", core), ("host", hosted)):
                observed, mask = golden["clip_x"][:, 1:], golden["mask16"]
                out = model(
                    observed, golden["global_clip_x"][:, 0], golden["prompt_pool"][:, 0], mask
                )
                tokens = features.pool(features.blend(out.patches, observed, mask))
                for key, found in {
                    "spatial_raw": out.patches,
                    "spatial_stage2": tokens,
                    "pooled": out.image.unsqueeze(1),
                    "label": out.label.unsqueeze(1),
                }.items():
                    yield (
                        f"SemInpainter {case} {key} ({where})",
                        *_error(found, golden[f"out.{key}"]),
                        BOUND,
                    )

    def unet(self):
        """The host's U-Net with the pack's patch, as the sampler calls it."""

        for case, golden in self._cases("unet_cases.safetensors"):
            conditional = bool(golden["fusion"].any())
            model = self._patched(golden["fusion"])
            options = {
                **model.model_options["transformer_options"],
                "cond_or_uncond": [0 if conditional else 1],
                "sigmas": torch.ones(len(golden["x"])),
            }
            x = torch.cat((golden["x"], golden["mask"], golden["masked_latent"]), dim=1)
            eps = model.model.diffusion_model(
                x, golden["timesteps"], context=golden["context"], transformer_options=options
            )
            yield f"U-Net with RefAdapter {case}", *_error(eps, golden["out.eps"]), BOUND

    def trajectory(self):
        """5 DDIM steps with CFG 7.5 through the host's sampler, on the sigmas of CAT Scheduler."""

        golden = {
            key.removeprefix("traj."): value
            for key, value in self.load(self.folder / "ddim.safetensors").items()
            if key.startswith("traj.")
        }
        model = self._patched(golden["fusion"])
        scale = model.model.latent_format.scale_factor
        values = {
            "concat_latent_image": golden["masked_latent"] / scale,
            "concat_mask": golden["mask"],
        }
        positive, negative = (
            [[golden[key], dict(values)]] for key in ("context", "uncond_context")
        )
        sigmas = official_sigmas(model, len(golden["x_steps"]))
        # The official latents are those of the host divided by sqrt(1 + sigma^2).
        start = (1 + sigmas[0] ** 2).sqrt() / sigmas[0]
        steps = []
        out = comfy.sample.sample_custom(
            model,
            golden["x_T"] * start,
            7.5,
            comfy.samplers.sampler_object("ddim"),
            sigmas,
            positive,
            negative,
            golden["x_T"] * 0,
            disable_pbar=True,
            seed=0,
            callback=lambda i, denoised, x, total: steps.append((x, denoised)),
        )
        for i, (x, denoised) in enumerate(steps):
            if i:
                found = x / (1 + sigmas[i] ** 2).sqrt()
                yield (
                    f"trajectory latent after step {i}",
                    *_error(found, golden["x_steps"][i - 1]),
                    BOUND,
                )
            yield (
                f"trajectory prediction in step {i + 1}",
                *_error(denoised, golden["pred_x0_steps"][i]),
                BOUND,
            )
        final = out * scale / (1 + sigmas[-1] ** 2).sqrt()
        yield "trajectory final latent", *_error(final, golden["out.final_latent"]), BOUND

    def _patched(self, visual_prompt):
        """The golden U-Net in the host, with the golden RefAdapter looking at (B, 64, D) tokens."""

        file = self._file("unet_tiny.safetensors")
        prompt = VisualPrompt(*(visual_prompt,) * 5)  # only its tokens are read
        return apply_ref_adapter(build_unet(file), build_cat_model(file), prompt)

    def _file(self, name: str):
        """A golden weights file in fp32; head counts come from the index, as tensors do not tell them."""

        parts, _ = weights.sort_keys(
            {key: value.float() for key, value in self.load(self.folder / name).items()}
        )
        heads, unet_heads = (
            self.index[key][field]
            for key, field in (("tiny_fusion", "num_attention_heads"), ("tiny_unet", "num_heads"))
        )
        architecture = Architecture(
            SemInpainterConfig.from_tensors(parts["sem_inpainter"], heads)
            if "sem_inpainter" in parts
            else None,
            RefAdapterConfig.from_tensors(parts["ref_adapter"], unet_heads)
            if "ref_adapter" in parts
            else None,
            unet_heads,
        )
        return weights.Checkpoint(self.folder / name, parts, architecture)

    def _cases(self, name: str):
        tensors = self.load(self.folder / name)
        for case in dict.fromkeys(key.split(".", 1)[0] for key in tensors):
            yield (
                case,
                {
                    key.removeprefix(case + "."): value
                    for key, value in tensors.items()
                    if key.startswith(case + ".")
                },
            )


def _error(found, golden) -> tuple[float, float]:
    """Largest absolute error, and the same relative to the largest golden value."""
    if found.shape != golden.shape:
        return float("nan"), float("nan")
    absolute = (found.double() - golden.double()).abs().max().item()
    return absolute, absolute / max(golden.double().abs().max().item(), 1e-30)
