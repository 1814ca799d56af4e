"""A second node pack for the test server: tiny models of other families, in the host's own classes, and odd pictures."""

import comfy.cldm.cldm
import comfy.clip_vision
import comfy.controlnet
import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.pixart_t5
import torch
from comfy_api.latest import ComfyExtension, io

UNET = dict(
    image_size=32,
    out_channels=4,
    model_channels=32,
    num_res_blocks=[1, 1],
    channel_mult=[1, 2],
    num_head_channels=-1,
    use_spatial_transformer=True,
    transformer_depth=[1, 1],
    transformer_depth_output=[1, 1, 1, 1],
    transformer_depth_middle=1,
    context_dim=24,
    legacy=False,
    adm_in_channels=None,
    use_linear_in_transformer=False,
    use_temporal_attention=False,
    use_checkpoint=False,
)


def patcher(model):
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def unet(family, heads=4, **changes):
    config = family({**UNET, **changes})
    config.unet_config.update(num_heads=heads, num_head_channels=-1)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return patcher(model)


def flux():
    newer = (
        {"txt_ids_dims": []}
        if "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__
        else {}
    )
    config = comfy.supported_models.Flux(
        dict(
            image_model="flux",
            in_channels=16,
            out_channels=16,
            vec_in_dim=8,
            context_in_dim=8,
            hidden_size=32,
            mlp_ratio=4.0,
            num_heads=2,
            depth=1,
            depth_single_blocks=1,
            axes_dim=[4, 6, 6],
            theta=10000,
            patch_size=2,
            qkv_bias=True,
            guidance_embed=False,
            **newer,
        )
    )
    config.set_inference_dtype(torch.float32, None)
    return patcher(config.get_model({}, ""))


class HelperModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HelperModel",
            inputs=[io.Combo.Input("kind", options=["sd15", "sdxl", "flux", "wide"])],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, kind):
        models = comfy.supported_models
        build = {
            "sd15": lambda: unet(models.SD15, in_channels=4),
            "flux": flux,
            "wide": lambda: unet(models.SD15, in_channels=9, model_channels=64),
            "sdxl": lambda: unet(
                models.SDXL,
                in_channels=4,
                adm_in_channels=2816,
                num_classes="sequential",
                transformer_depth=[0, 2],
                transformer_depth_output=[2, 2, 0, 0],
                use_linear_in_transformer=True,
            ),
        }
        return io.NodeOutput(build[kind]())


class HelperClip(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HelperClip",
            inputs=[io.Combo.Input("kind", options=["sdxl", "t5", "wide"])],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, kind):
        small = dict(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
        )
        options = {
            "clip_l_model_config": dict(small),
            "clip_g_model_config": dict(small),
            "t5xxl_model_config": dict(d_model=32, d_ff=64, d_kv=16, num_heads=2, num_layers=1),
        }
        t5, sdxl, sd1 = comfy.text_encoders.pixart_t5, comfy.sdxl_clip, comfy.sd1_clip
        target = {
            "sdxl": (sdxl.SDXLTokenizer, sdxl.SDXLClipModel),
            "t5": (t5.PixArtTokenizer, t5.pixart_te()),
            "wide": (sd1.SD1Tokenizer, sd1.SD1ClipModel),
        }[kind]
        return io.NodeOutput(
            comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(*target), model_options=options)
        )


class HelperClipVision(io.ComfyNode):
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
        import json
        import tempfile

        config = dict(
            model_type="clip_vision_model",
            hidden_act="quick_gelu",
            hidden_size=width,
            image_size=size,
            patch_size=patch,
            num_channels=3,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(config, file)
            file.flush()
            return io.NodeOutput(comfy.clip_vision.ClipVisionModel(file.name))


class HelperVae(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="HelperVae", inputs=[io.Vae.Input("vae")], outputs=[io.Vae.Output()]
        )

    @classmethod
    def execute(cls, vae):
        import copy

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
        width, depth, context = (64, 0, 32) if demo else (32, 1, 24)
        model = comfy.cldm.cldm.ControlNet(
            image_size=32,
            in_channels=4,
            model_channels=width,
            hint_channels=3,
            num_res_blocks=[1, 1],
            channel_mult=[1, 2],
            num_heads=4,
            num_head_channels=-1,
            use_spatial_transformer=True,
            transformer_depth=[depth, 1],
            transformer_depth_middle=1,
            context_dim=context,
            legacy=False,
            dtype=torch.float32,
            operations=comfy.ops.disable_weight_init,
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        return io.NodeOutput(comfy.controlnet.ControlNet(model, load_device=torch.device("cpu")))


class HelperImage(io.ComfyNode):
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
        image[0, 3, 3, 0] = {"nan": float("nan"), "bright": 7.0}.get(kind, 0.5)
        return io.NodeOutput(image)


class Helpers(ComfyExtension):
    async def get_node_list(self):
        return [HelperModel, HelperClip, HelperClipVision, HelperVae, HelperControlNet, HelperImage]


async def comfy_entrypoint():
    return Helpers()
