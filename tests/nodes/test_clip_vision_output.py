"""A visual prompt on the host's own wire: against its CLIP Vision Encode, and into its nodes."""

import dataclasses

import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import dynamic_vram
import pytest
import torch
from comfy.t2i_adapter.adapter import StyleAdapter
from paths import ROOT

import nodes
from cat_diffusion.cat_core.pictures.tensors import channels_last
from cat_diffusion.nodes import visual_prompt
from cat_diffusion.nodes.clip_vision_output import CATVisualPromptToClipVision
from cat_diffusion.nodes.host.clip import encode_image, encode_text
from cat_diffusion.nodes.load import load_full_checkpoint
from cat_diffusion.nodes.visual_prompt import CATEncodeVisualPrompt
from demo_model import scenes

pytestmark = pytest.mark.slow

COLOURS = ("red star", "blue star")


@pytest.fixture(scope="module")
def demo():
    """The pack's demo model, whose CLIP has a projection."""
    with torch.inference_mode():
        return load_full_checkpoint(ROOT / "models/cat_demo_model.safetensors")


@pytest.fixture(scope="module")
def predict(demo):
    """(visual prompt, CLIP_VISION_OUTPUT) of a drawn scene whose object is hidden."""

    def predict(label=None, number=10):
        scene = scenes.scene(scenes.TEST[number])
        with torch.inference_mode():
            prompt = visual_prompt.predict(
                demo.cat_model,
                demo.clip_vision,
                demo.clip,
                channels_last([scene.without]),
                channels_last([scenes.holes(scene, "box")])[..., 0],
                label or scene.label,
            )
            (output,) = CATVisualPromptToClipVision.execute(prompt, demo.clip_vision).args
        return prompt, output

    return predict


def stock_output(clip_vision, prompt):
    """What the host's own node gives for the picture that CLIP saw."""
    image = prompt.picture.movedim(1, -1).float() / 255
    return nodes.CLIPVisionEncode().encode(clip_vision, image, "none")[0]


# Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "demo"])
def test_without_sem_inpainter_it_is_what_the_host_encodes(name, models, demo, picture):
    clip_vision = {"tiny": models, "demo": demo}[name].clip_vision
    image = torch.cat((picture[0], picture[0].flip(2)))
    prompt = CATEncodeVisualPrompt.execute(clip_vision, image).args[0]
    found = CATVisualPromptToClipVision.execute(prompt, clip_vision).args[0]
    expected = stock_output(clip_vision, prompt)
    for field in ("last_hidden_state", "image_embeds"):
        assert found[field].shape == expected[field].shape
        assert torch.allclose(found[field], expected[field].float(), atol=1e-5), field
    assert found.image_sizes == expected.image_sizes
    assert found.mm_projected is expected.mm_projected is None


def test_predicted_cells_and_the_predicted_image_feature(demo, predict):
    prompt, output = predict()
    assert torch.equal(output.last_hidden_state[:, 1:], prompt.after)
    stock = stock_output(demo.clip_vision, prompt)
    assert torch.allclose(output.last_hidden_state[:, :1], stock.last_hidden_state[:, :1])

    patches, image = encode_image(demo.clip_vision, prompt.picture)
    text = encode_text(demo.clip, prompt.text)
    by_hand = demo.cat_model.sem_inpainter.model(patches, image, text, prompt.patch_mask)
    assert torch.allclose(prompt.image_feature, by_hand.image, atol=1e-5)
    projected = demo.clip_vision.model.visual_projection(by_hand.image)
    assert torch.allclose(output.image_embeds, projected, atol=1e-5)
    assert not torch.allclose(output.image_embeds, stock.image_embeds, atol=0.1)


def similarity(one, other):
    """Cosine of two projected image features."""
    return torch.cosine_similarity(one.image_embeds, other.image_embeds).item()


def test_the_prediction_is_nearer_to_the_whole_picture_than_what_clip_sees(demo, predict):
    """Of ten test scenes on the average."""
    gains = []
    for number in range(10):
        prompt, output = predict(number=number)
        whole = channels_last([scenes.scene(scenes.TEST[number]).image])
        truth = stock_output(
            demo.clip_vision, CATEncodeVisualPrompt.execute(demo.clip_vision, whole).args[0]
        )
        seen = stock_output(demo.clip_vision, prompt)
        gains.append(similarity(output, truth) - similarity(seen, truth))
    assert sum(gains) / len(gains) > 0.05


def test_a_clip_vision_without_a_projection_gives_its_image_feature(models, prompt, caplog):
    """As the host does, and the node says so."""
    caplog.set_level("INFO")
    output = CATVisualPromptToClipVision.execute(prompt, models.clip_vision).args[0]
    assert torch.equal(output.image_embeds, prompt.image_feature)
    assert "This CLIP vision has no projection: its image feature is handed on" in caplog.text


def test_another_clip_vision_is_refused(demo, prompt):
    with pytest.raises(ValueError, match=r"does not fit: .* expected .* with 32 features"):
        CATVisualPromptToClipVision.execute(prompt, demo.clip_vision)


def test_what_is_not_predicted_is_said(models, prompt):
    output = CATVisualPromptToClipVision.execute(prompt, models.clip_vision).args[0]
    with pytest.raises(AttributeError, match=r"has no penultimate_hidden_states.*CLIP Vision Enc"):
        output["penultimate_hidden_states"]
    assert not hasattr(output, "all_hidden_states")


# Into the host's nodes ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def style_model():
    """The host's style adapter, as wide as the tiny CLIP, for the tiny U-Net's context."""
    torch.manual_seed(0)
    adapter = StyleAdapter(width=32, context_dim=24, num_head=4, n_layes=2, num_token=8)
    return comfy.sd.StyleModel(adapter.eval())


def test_apply_style_model(models, picture, conditioned, sample, style_model):
    """Its tokens come from the predicted features, and they reach the picture."""
    latents = []
    for text in COLOURS:
        prompt = visual_prompt.predict(
            models.cat_model, models.clip_vision, models.clip, *picture, text
        )
        output = CATVisualPromptToClipVision.execute(prompt, models.clip_vision).args[0]
        (styled,) = nodes.StyleModelApply().apply_stylemodel(
            conditioned[0], style_model, output, 0.5, "multiply"
        )
        context = styled[0][0]
        assert context.shape[1] == conditioned[0][0][0].shape[1] + 8
        assert torch.equal(context[:, -8:], style_model.model(output.last_hidden_state) * 0.5)
        latents.append(sample(models.model, positive=styled))
    first, second = latents
    assert first.isfinite().all()
    assert not torch.equal(first, second)
    assert not torch.equal(first, sample(models.model))


@pytest.fixture(scope="module")
def unclip_model(demo):
    """A tiny U-Net of the host's unCLIP kind, for the demo CLIP's projected features."""
    width = demo.clip_vision.model.visual_projection.weight.shape[0]
    config = comfy.supported_models.SD21UnclipL(
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "num_res_blocks": [1, 1],
            "channel_mult": [1, 2],
            "transformer_depth": [0, 1],
            "transformer_depth_output": [0, 0, 1, 1],
            "transformer_depth_middle": 1,
            "context_dim": 64,
            "num_heads": 4,
            "num_head_channels": -1,
            "use_linear_in_transformer": True,
            "use_spatial_transformer": True,
            "legacy": False,
            "adm_in_channels": 2 * width,
            "num_classes": "sequential",
            "dtype": torch.float32,
        }
    )
    schedule = {"timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
    config.noise_aug_config = {"noise_schedule_config": schedule, "timestep_dim": width}
    config.manual_cast_dtype = None
    torch.manual_seed(0)
    with dynamic_vram.ordinary_layers():
        model = config.get_model({})
    for weight in model.diffusion_model.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), cpu, cpu)


def test_unclip_conditioning(predict, unclip_model):
    """The named object reaches the U-Net by the projected feature, and nothing else does."""
    empty = [[torch.zeros(1, 77, 64), {}]]
    latent = {"samples": torch.zeros(1, 4, 16, 16)}

    def sample(output, strength=1.0):
        (positive,) = nodes.unCLIPConditioning().apply_adm(empty, output, strength, 0.0)
        (sampled,) = nodes.common_ksampler(
            unclip_model, 1, 2, 3.0, "euler", "normal", positive, empty, latent
        )
        return sampled["samples"]

    outputs = [predict(text)[1] for text in COLOURS]
    first, second = map(sample, outputs)
    assert first.isfinite().all()
    assert not torch.equal(first, second)
    assert torch.equal(first, sample(outputs[0]))
    assert torch.equal(sample(outputs[0], 0.0), sample(outputs[1], 0.0))
    assert not torch.equal(first, sample(outputs[0], 0.0))


def test_a_batch_is_one_row_each(models, picture):
    image, mask = picture
    prompt = visual_prompt.predict(
        models.cat_model,
        models.clip_vision,
        models.clip,
        torch.cat((image, image.flip(2))),
        mask.expand(2, -1, -1),
        "spoon",
    )
    output = CATVisualPromptToClipVision.execute(prompt, models.clip_vision).args[0]
    assert output.last_hidden_state.shape == (2, 257, 32)
    assert output.image_embeds.shape == (2, 32)
    second = dataclasses.replace(
        prompt,
        after=prompt.after[1:],
        picture=prompt.picture[1:],
        image_feature=prompt.image_feature[1:],
    )
    alone = CATVisualPromptToClipVision.execute(second, models.clip_vision).args[0]
    assert torch.allclose(output.last_hidden_state[1:], alone.last_hidden_state, atol=1e-5)
    assert torch.equal(output.image_embeds[1:], alone.image_embeds)
