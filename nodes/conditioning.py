"""What the 9-channel U-Net sees besides the noise, and the official noise schedule."""

import torch
from comfy_api.latest import io

from ..cat_core import preprocess
from .checks import check_choice, check_conditioning, check_number, check_switch, check_wires
from .host import symbols
from .host.messages import say, sentence
from .host.stock_conditioning import stock_inpaint_conditioning, with_values
from .host.unet import encode_sampled, trained_sigmas, vae_cell
from .notes import about_empty
from .wires import CATEGORY, to_core

FILLS = ["black", "grey"]  # colours of the hole
POSTERIORS = ["mode", "sample"]  # what is taken of the VAE's posterior
MOST_SEED = 2**64 - 1
MOST_STEPS = 1000


class CATInpaintConditioning(io.ComfyNode):
    """The masked photo and the mask, prepared as CAT-Diffusion was trained."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CATInpaintConditioning",
            display_name="CAT Inpaint Conditioning",
            category=CATEGORY,
            search_aliases=[
                "inpaint model conditioning",
                "masked image",
                "black fill",
                "局部重绘",
                "内补",
            ],
            description="Give the inpainting model the photo and the mask. "
            "Like Inpaint Model Conditioning, but with the "
            "hole filled black and the mask resized as CAT-Diffusion was trained.",
            inputs=[
                io.Conditioning.Input(
                    "positive", tooltip="The prompt, usually just the object's name."
                ),
                io.Conditioning.Input(
                    "negative", tooltip="The negative prompt; empty as in the paper."
                ),
                io.Vae.Input("vae", tooltip="SD 1.5's VAE."),
                io.Image.Input(
                    "image",
                    tooltip="The photo. Sides are cropped to multiples of 8 as ComfyUI does.",
                ),
                io.Mask.Input(
                    "mask", tooltip="White where the object goes. Any size; soft edges are fine."
                ),
                io.Combo.Input(
                    "fill",
                    options=FILLS,
                    default="black",
                    tooltip="Colour of the hole before encoding. Black: CAT-Diffusion. Grey: "
                    "stock SD 1.5 inpainting, by ComfyUI's own Inpaint Model Conditioning.",
                ),
                io.Boolean.Input(
                    "noise_mask",
                    default=False,
                    tooltip="Sample only inside the mask and keep the photo's latents outside "
                    "at every step. Off as in the paper; turn it on for a denoise below 1.",
                ),
                io.Combo.Input(
                    "posterior",
                    options=POSTERIORS,
                    default="mode",
                    optional=True,
                    advanced=True,
                    tooltip="Latent of the masked photo. Mode: the VAE's best guess, as ComfyUI "
                    "takes it. Sample: drawn at random from the VAE's posterior, as the official "
                    "code does.",
                ),
                io.Int.Input(
                    "posterior_seed",
                    default=0,
                    min=0,
                    max=MOST_SEED,
                    control_after_generate=False,
                    optional=True,
                    advanced=True,
                    tooltip="Seed of that sample; nothing else looks at it.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(
                    display_name="latent", tooltip="The encoded photo, in the size to sample."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        positive,
        negative,
        vae,
        image,
        mask,
        fill,
        noise_mask,
        posterior="mode",
        posterior_seed=0,
    ) -> io.NodeOutput:
        check_choice("fill", fill, FILLS)
        check_switch("noise_mask", noise_mask)
        check_choice("posterior", posterior, POSTERIORS)
        check_number("posterior_seed", posterior_seed, 0, MOST_SEED, whole=True)
        seed = int(posterior_seed) if posterior == "sample" else None
        return io.NodeOutput(
            *inpaint_conditioning(positive, negative, vae, image, mask, fill, noise_mask, seed)
        )


def inpaint_conditioning(
    positive,
    negative,
    vae,
    image,
    mask,
    fill: str = "black",
    noise_mask: bool = False,
    posterior_seed: int | None = None,
):
    """Both CONDITIONINGs with the masked photo and the mask, and the photo's LATENT.

    Args:
        image: IMAGE (B, H, W, 3) in [0, 1].
        mask: MASK (B, H, W), 1 = repaint.
        fill: "black" as CAT-Diffusion was trained, "grey" as stock SD 1.5 inpainting.
        noise_mask: also hand the sampler the mask, so that it keeps the latent outside.
        posterior_seed: sample the VAE's posterior of the masked photo with this seed, as the
            official code does; None takes its mode.
    """
    check_conditioning(positive=positive, negative=negative)
    check_wires(vae=vae, mask=mask)
    cell = vae_cell(vae)
    photos = image
    image, mask = to_core(image, mask)
    height, width = image.shape[2:]
    if min(height, width) < cell:
        raise ValueError(
            f"The image is {width}x{height} pixels; the VAE needs at least {cell}x{cell}. "
            "Scale it up."
        )
    notes = about_empty(mask)
    if len(photos) < len(mask):
        notes.append(
            sentence(
                "There are {masks} masks for one image: {masks} pictures are made of it. Image "
                "Composite Masked saves as many as it gets of the photo; put Repeat Image Batch "
                "before its destination.",
                masks=len(mask),
            )
        )
    say(*notes)
    if fill == "grey":
        if posterior_seed is not None:
            raise ValueError(
                "posterior is sample and fill is grey, which ComfyUI's own node encodes by the "
                "mode. Set fill to black, or posterior to mode."
            )
        return stock_inpaint_conditioning(
            positive, negative, vae, image.movedim(1, -1), mask.squeeze(1), noise_mask
        )
    mask_full = preprocess.resize_mask(mask, height, width)
    photo = _crop(image, cell)
    hole = _crop(mask_full, cell)
    masked_photo = (preprocess.vae_input(photo, hole) + 1) / 2  # [-1, 1] -> [0, 1], as IMAGE
    masked_image = masked_photo.float().movedim(1, -1)
    if posterior_seed is None:
        masked_latent = vae.encode(masked_image)  # (B, 4, h, w)
    else:
        masked_latent = encode_sampled(vae, masked_image, posterior_seed)
    latent = {"samples": vae.encode(photo.movedim(1, -1))}
    if noise_mask:
        latent["noise_mask"] = hole
    latent_hole = preprocess.latent_mask(hole, *masked_latent.shape[-2:])
    values = symbols.inpaint_values(masked_latent, latent_hole)
    return with_values(positive, values), with_values(negative, values), latent


def _crop(x: torch.Tensor, cell: int) -> torch.Tensor:
    """Centre-crop (B, C, H, W) to multiples of `cell`, where the host's VAE would crop it."""
    for dim in (2, 3):
        side = x.shape[dim]
        x = x.narrow(dim, side % cell // 2, side // cell * cell)
    return x


class CATScheduler(io.ComfyNode):
    """The official DDIM schedule, for SamplerCustom with the ddim or euler sampler."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CATScheduler",
            display_name="CAT Scheduler",
            category=CATEGORY,
            search_aliases=["ddim sigmas", "official schedule", "sigmas", "调度器"],
            description="Sigmas of the official DDIM schedule for SamplerCustom (sampler: ddim). "
            "It ends at the smallest trained noise level, not at zero.",
            inputs=[
                io.Model.Input("model", tooltip="An SD 1.5 model."),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=MOST_STEPS,
                    tooltip="The paper uses 50. Where 1000 is not a multiple, the official code "
                    "makes more steps (31 for 30, 999 above 500); so does this.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 starts from noise alone; less keeps that much of the latent.",
                ),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, model, steps, denoise) -> io.NodeOutput:
        check_wires(model=model)
        check_number("steps", steps, 1, MOST_STEPS, whole=True)
        check_number("denoise", denoise, 0, 1)
        return io.NodeOutput(official_sigmas(model, steps, denoise))


def official_sigmas(model, steps: int, denoise: float = 1.0) -> torch.Tensor:
    """Descending noise levels of the official DDIM sampler; the last is the smallest trained one.

    Args:
        steps: as the official code counts them: where 1000 is not a multiple, there are more.
        denoise: the share of the schedule that is run, its end; at 0 there are no noise levels.
    """
    sigmas = trained_sigmas(model)
    if denoise <= 0:
        return torch.FloatTensor([])
    steps_from_noise = steps if denoise == 1 else int(steps / denoise)
    stride = max(len(sigmas) // steps_from_noise, 1)
    # Ascending; the official code has range(0, 1000, stride) + 1.
    timesteps = torch.arange(1, len(sigmas), stride)
    if denoise < 1:
        kept = min(steps, round(len(timesteps) * denoise))
        timesteps = timesteps[:kept]
    return torch.cat((sigmas[timesteps.flip(0)], sigmas[:1]))
