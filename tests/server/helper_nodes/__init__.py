"""A second node pack for the test server.

Tiny models of other families, in the host's own classes, and odd pictures.
"""

import copy
import gc
import json
import tempfile

import comfy.cldm.cldm
import comfy.clip_vision
import comfy.controlnet
import comfy.ldm.flux.model
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.pixart_t5
import torch
from comfy_api.latest import ComfyExtension, io

CPU = torch.device("cpu")
UNET = {
    "image_size": 32,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 24,
    "legacy": False,
    "adm_in_channels": None,
    "use_linear_in_transformer": False,
    "use_temporal_attention": False,
    "use_checkpoint": False,
}
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 8,
    "context_in_dim": 8,
    "hidden_size": 32,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [4, 6, 6],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
}


def patcher(model):
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)


def unet(family, heads=4, **changes):
    """A U-Net with the same random weights each time."""
    config = family({**UNET, **changes})
    config.unet_config.update(num_heads=heads, num_head_channels=-1)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return patcher(model)


def sdxl():
    return unet(
        comfy.supported_models.SDXL,
        in_channels=4,
        adm_in_channels=2816,
        num_classes="sequential",
        transformer_depth=[0, 2],
        transformer_depth_output=[2, 2, 0, 0],
        use_linear_in_transformer=True,
    )


def flux():
    settings = dict(FLUX)
    if "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__:
        settings["txt_ids_dims"] = []  # newer hosts
    config = comfy.supported_models.Flux(settings)
    config.set_inference_dtype(torch.float32, None)
    return patcher(config.get_model({}, ""))


class HelperModel(io.ComfyNode):
    """A MODEL that is none for CAT-Diffusion."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HelperModel",
            inputs=[io.Combo.Input("kind", options=["sd15", "sdxl", "flux", "wide"])],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, kind):
        if kind == "sdxl":
            return io.NodeOutput(sdxl())
        if kind == "flux":
            return io.NodeOutput(flux())
        family = comfy.supported_models.SD15
        if kind == "sd15":  # not for inpainting
            return io.NodeOutput(unet(family, in_channels=4))
        return io.NodeOutput(unet(family, in_channels=9, model_channels=64))


class HelperClip(io.ComfyNode):
    """A CLIP that is none for CAT-Diffusion."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HelperClip",
            inputs=[io.Combo.Input("kind", options=["sdxl", "t5", "wide"])],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, kind):
        small = {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        }
        small_t5 = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 1}
        options = {
            "clip_l_model_config": dict(small),
            "clip_g_model_config": dict(small),
            "t5xxl_model_config": small_t5,
        }
        t5 = comfy.text_encoders.pixart_t5
        targets = {
            "sdxl": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
            "t5": (t5.PixArtTokenizer, t5.pixart_te()),
            "wide": (comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
        }
        target = comfy.supported_models_base.ClipTarget(*targets[kind])
        return io.NodeOutput(comfy.sd.CLIP(target, model_options=options))


class HelperClipVision(io.ComfyNode):
    """A CLIP_VISION of any size."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HelperClipVision",
            outputs=[io.ClipVision.Output()],
            inputs=[
                io.Int.Input("width", default=32),
                io.Int.Input("patch", default=14),
                io.Int.Input("size", default=224),
            ],
        )

    @classmethod
    def execute(cls, width, patch, size):
        config = {
            "model_type": "clip_vision_model",
            "hidden_act": "quick_gelu",
            "hidden_size": width,
            "image_size": size,
            "patch_size": patch,
            "num_channels": 3,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(config, file)
            file.flush()
            return io.NodeOutput(comfy.clip_vision.ClipVisionModel(file.name))


class HelperVae(io.ComfyNode):
    """A VAE that says it is of another family."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HelperVae", inputs=[io.Vae.Input("vae")], outputs=[io.Vae.Output()]
        )

    @classmethod
    def execute(cls, vae):
        other = copy.copy(vae)
        other.latent_channels = 16  # as Flux's and SD 3's
        return io.NodeOutput(other)


class HelperControlNet(io.ComfyNode):
    """A small ControlNet with random weights, for the tiny U-Net or the demo model's."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HelperControlNet",
            inputs=[io.Boolean.Input("demo", default=False)],
            outputs=[io.ControlNet.Output()],
        )

    @classmethod
    def execute(cls, demo):
        torch.manual_seed(0)
        model = comfy.cldm.cldm.ControlNet(
            image_size=32,
            in_channels=4,
            model_channels=64 if demo else 32,
            hint_channels=3,
            num_res_blocks=[1, 1],
            channel_mult=[1, 2],
            num_heads=4,
            num_head_channels=-1,
            use_spatial_transformer=True,
            transformer_depth=[0, 1] if demo else [1, 1],
            transformer_depth_middle=1,
            context_dim=32 if demo else 24,
            legacy=False,
            dtype=torch.float32,
            operations=comfy.ops.disable_weight_init,
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        return io.NodeOutput(comfy.controlnet.ControlNet(model, load_device=CPU))


class HelperImage(io.ComfyNode):
    """A noisy picture with one odd pixel, or without colours."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HelperImage",
            inputs=[io.Combo.Input("kind", options=["nan", "grey", "bright"])],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, kind):
        image = torch.rand(1, 64, 64, 1 if kind == "grey" else 3)
        odd_values = {"nan": float("nan"), "bright": 7.0}
        image[0, 3, 3, 0] = odd_values.get(kind, 0.5)
        return io.NodeOutput(image)


class HelperCount(io.ComfyNode):
    """How many Python objects, tensors and loaded models there are, after the picture is made."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HelperCount", inputs=[io.Image.Input("image")], is_output_node=True
        )

    @classmethod
    def execute(cls, image):
        gc.collect()
        objects = gc.get_objects()
        tensors = sum(issubclass(type(found), torch.Tensor) for found in objects)
        models = len(comfy.model_management.current_loaded_models)
        return io.NodeOutput(ui={"counts": [len(objects), tensors, models]})


class Helpers(ComfyExtension):
    async def get_node_list(self):
        return [
            HelperModel,
            HelperClip,
            HelperClipVision,
            HelperVae,
            HelperControlNet,
            HelperImage,
            HelperCount,
        ]


async def comfy_entrypoint():
    return Helpers()
