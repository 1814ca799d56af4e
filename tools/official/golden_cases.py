"""This pack and the official implementation on the same inputs, in the real ComfyUI."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from cat_diffusion.cat_core import features, preprocess, weights
from cat_diffusion.cat_core.config import Architecture, RefAdapterConfig, SemInpainterConfig
from cat_diffusion.cat_core.features import VisualPrompt
from cat_diffusion.nodes.apply_ref_adapter import apply_ref_adapter
from cat_diffusion.nodes.conditioning import official_sigmas
from cat_diffusion.nodes.host import sampling, symbols
from cat_diffusion.nodes.host.build import build_cat_model, build_unet

BOUND = 1e-5  # of the largest value, fp32
EXACT = 0.0
SMALLEST = 1e-30  # of a golden's largest value, to divide by
CFG = 7.5
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class CaseResult:
    """How far the pack is from the official implementation in one tensor; NaN for other shapes."""

    name: str
    absolute: float  # largest error
    relative: float  # the same, over the largest golden value
    bound: float  # of the relative error

    @property
    def is_within(self) -> bool:
        return self.relative <= self.bound  # False for NaN

    def __str__(self):
        verdict = "ok  " if self.is_within else "FAIL"
        return (
            f"{verdict} {self.name:<44} abs {self.absolute:.2e}  rel {self.relative:.2e}  "
            f"bound {self.bound:.0e}"
        )


def command(parser, folder: Path) -> int:
    """Print a line a case; returns 1 if an error exceeds its bound."""
    failures = 0
    try:
        for result in results(Goldens(folder)):
            print(result, flush=True)
            failures += not result.is_within
    except FileNotFoundError as error:
        parser.error(f"{folder} is incomplete: {error}")
    if failures:
        print(f"{failures} of the cases exceed their bound.")
        return 1
    print("All cases are within their bounds.")
    return 0


class Goldens:
    """A folder of tensors that the official implementation produced; index.json describes them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.index = json.loads((folder / "index.json").read_text())

    def tensors(self, name: str) -> Tensors:
        """Everything in a file."""
        return load_file(self.folder / name)

    def cases(self, name: str) -> Iterator[tuple[str, Tensors]]:
        """Name and tensors of each case in a file, whose keys are `case.tensor`."""
        cases: dict[str, Tensors] = {}
        for key, tensor in self.tensors(name).items():
            case, tensor_name = key.split(".", 1)
            cases.setdefault(case, {})[tensor_name] = tensor
        yield from cases.items()

    def picture(self, kind: str, number: str, mode: str) -> torch.Tensor:
        """A picture or mask of the preprocessing cases, (1, C, H, W) in [0, 1]."""
        path = self.folder / "preproc" / f"{kind}{number}.png"
        levels = torch.from_numpy(np.array(Image.open(path).convert(mode)))
        if mode == "L":
            levels = levels.unsqueeze(2)
        return levels.permute(2, 0, 1).unsqueeze(0).float() / 255

    def checkpoint(self, name: str) -> weights.Checkpoint:
        """A weights file in fp32; head counts come from the index, as tensors do not tell them."""
        tensors = {key: tensor.float() for key, tensor in self.tensors(name).items()}
        parts, _ = weights.sort_keys(tensors)
        heads = self.index["tiny_fusion"]["num_attention_heads"]
        unet_heads = self.index["tiny_unet"]["num_heads"]
        sem_inpainter = None
        ref_adapter = None
        if "sem_inpainter" in parts:
            sem_inpainter = SemInpainterConfig.from_tensors(parts["sem_inpainter"], heads)
        if "ref_adapter" in parts:
            ref_adapter = RefAdapterConfig.from_tensors(parts["ref_adapter"], unet_heads)
        architecture = Architecture(sem_inpainter, ref_adapter, unet_heads)
        return weights.Checkpoint(self.folder / name, parts, architecture)

    def patched_unet(self, tokens: torch.Tensor):
        """The U-Net in the host, with the RefAdapter looking at tokens (B, 64, D)."""
        file = self.checkpoint("unet_tiny.safetensors")
        prompt = VisualPrompt(
            tokens=tokens,
            before=tokens,  # only the tokens are read
            after=tokens,
            patch_mask=tokens,
            picture=tokens,
        )
        return apply_ref_adapter(build_unet(file), build_cat_model(file), prompt)


def results(goldens: Goldens) -> Iterator[CaseResult]:
    """All cases."""
    for cases in (preprocessing, sem_inpainter, unet, trajectory):
        with torch.inference_mode():
            yield from cases(goldens)


def preprocessing(goldens: Goldens) -> Iterator[CaseResult]:
    """Bit-exact: the whole array's sha256 where the index has one, else the stored samples."""
    stored = goldens.tensors("preproc.safetensors")
    pictures = goldens.index["files"]["preproc.safetensors"]["images"]
    for name, facts in pictures.items():
        number = name.removeprefix("img")
        image = goldens.picture("img", number, "RGB")
        mask = goldens.picture("mask", number, "L")
        title = f"preprocessing {name}"

        seen = preprocess.clip_input(image, mask)
        image_512 = preprocess.resize(image, 512, 512)
        mask_512 = preprocess.resize(mask, 512, 512)
        masked = preprocess.vae_input(image_512 / 255.0, mask_512 / 255.0)
        arrays = {
            "image_512_u8": image_512,
            "mask_512_u8": mask_512,
            "image_224_u8": seen.image,
            "masked_image_224_u8": seen.masked_image,
            "masked_image_512_f64": masked,
            "masked_image_512_f32": masked.float(),
            "jpg_f32": preprocess.vae_input(image_512 / 255.0).float(),
        }
        for key, array in arrays.items():
            same = _sha256(array) == facts["sha256"][key]
            error = 0.0 if same else float("nan")
            yield CaseResult(f"{title} {key} sha256", error, error, EXACT)

        latent_mask = preprocess.latent_mask(mask_512 / 255.0, 64, 64)
        patch_mask = seen.patch_mask.flatten()
        yield _compared(f"{title} mask_16", patch_mask, stored[f"{name}.mask_16"], EXACT)
        yield _compared(f"{title} mask_64", latent_mask[0, 0], stored[f"{name}.mask_64"], EXACT)
        pixels = preprocess.clip_normalise(seen.masked_image)[0][:, ::4, ::4]
        golden = stored[f"{name}.clip_pixel_values_sub4"]
        yield _compared(f"{title} clip_pixel_values", pixels, golden)


def _sha256(array: torch.Tensor) -> str:
    """Of (1, C, H, W), as the official arrays lie in memory: (H, W, C), or (H, W) for C = 1."""
    official = array[0].permute(1, 2, 0).squeeze(2).contiguous()
    return hashlib.sha256(official.numpy().tobytes()).hexdigest()


def sem_inpainter(goldens: Goldens) -> Iterator[CaseResult]:
    """In the core with torch's own operations, and in the host with the host's."""
    file = goldens.checkpoint("fusion_tiny.safetensors")
    core = weights.cat_modules(file.architecture)["sem_inpainter"]
    core.load_state_dict(file.parts["sem_inpainter"])
    # Global and label output, too: the blended one alone cannot tell whether they are swapped.
    hosted = build_cat_model(file).sem_inpainter.model
    for case, golden in goldens.cases("fusion_cases.safetensors"):
        for where, model in (("core", core), ("host", hosted)):
            for key, tensor in _sem_inpainter_outputs(model, golden).items():
                title = f"SemInpainter {case} {key} ({where})"
                yield _compared(title, tensor, golden[f"out.{key}"])


def _sem_inpainter_outputs(model, golden: Tensors) -> Tensors:
    """By the golden's names."""
    observed = golden["clip_x"][:, 1:]
    image = golden["global_clip_x"][:, 0]
    text = golden["prompt_pool"][:, 0]
    mask = golden["mask16"]
    out = model(observed, image, text, mask)
    return {
        "spatial_raw": out.patches,
        "spatial_stage2": features.pool(features.blend(out.patches, observed, mask)),
        "pooled": out.image.unsqueeze(1),
        "label": out.label.unsqueeze(1),
    }


def unet(goldens: Goldens) -> Iterator[CaseResult]:
    """The host's U-Net with the pack's patch, as the sampler calls it."""
    for case, golden in goldens.cases("unet_cases.safetensors"):
        model = goldens.patched_unet(golden["fusion"])
        conditional = bool(golden["fusion"].any())
        kind = symbols.POSITIVE if conditional else symbols.NEGATIVE
        options = symbols.sampler_options(model, [kind], torch.ones(len(golden["x"])))
        x = torch.cat((golden["x"], golden["mask"], golden["masked_latent"]), dim=1)
        module = symbols.unet_module(model)
        eps = symbols.call_unet(module, x, golden["timesteps"], golden["context"], options)
        yield _compared(f"U-Net with RefAdapter {case}", eps, golden["out.eps"])


def trajectory(goldens: Goldens) -> Iterator[CaseResult]:
    """5 DDIM steps with CFG 7.5 through the host's sampler, on the sigmas of CAT Scheduler."""
    golden = dict(goldens.cases("ddim.safetensors"))["traj"]
    model = goldens.patched_unet(golden["fusion"])
    scale = symbols.latent_scale(model)
    values = symbols.inpaint_values(golden["masked_latent"] / scale, golden["mask"])
    sigmas = official_sigmas(model, len(golden["x_steps"]))
    # The official latents are those of the host divided by sqrt(1 + sigma^2).
    start = (1 + sigmas[0] ** 2).sqrt() / sigmas[0]
    steps = []

    def on_step(number, denoised, x, total):
        steps.append((x, denoised))

    out = sampling.sample_on_sigmas(
        model,
        golden["x_T"] * start,
        sigmas,
        cfg=CFG,
        positive=[[golden["context"], dict(values)]],
        negative=[[golden["uncond_context"], dict(values)]],
        latent=golden["x_T"] * 0,
        callback=on_step,
    )
    for number, (x, denoised) in enumerate(steps):
        if number > 0:
            latent = x / (1 + sigmas[number] ** 2).sqrt()
            title = f"trajectory latent after step {number}"
            yield _compared(title, latent, golden["x_steps"][number - 1])
        title = f"trajectory prediction in step {number + 1}"
        yield _compared(title, denoised, golden["pred_x0_steps"][number])
    final = out * scale / (1 + sigmas[-1] ** 2).sqrt()
    yield _compared("trajectory final latent", final, golden["out.final_latent"])


def _compared(
    name: str, tensor: torch.Tensor, golden: torch.Tensor, bound: float = BOUND
) -> CaseResult:
    if tensor.shape != golden.shape:
        return CaseResult(name, float("nan"), float("nan"), bound)
    absolute = (tensor.double() - golden.double()).abs().max().item()
    largest = golden.double().abs().max().item()
    return CaseResult(name, absolute, absolute / max(largest, SMALLEST), bound)
