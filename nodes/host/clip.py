"""The host's CLIP and CLIP_VISION: what they must be like, and their features."""

import torch

from . import symbols

WIDTH = 1024  # of CLIP ViT-L/14, named where nothing says what is expected
# A trained projection's weights spread about 1 / sqrt(width); see text_similarity.
LEAST_SPREAD = 0.25
LARGEST_SPREAD = 4


def check_clip_vision(clip_vision, width: int | None = None, grid: int = 16) -> None:
    """Raise unless this is a CLIP ViT with that many features and patches."""
    config = symbols.vision_config(clip_vision)
    kind = config.get("model_type", "unknown")
    its_width = config.get("hidden_size")
    its_grid = config.get("image_size", 0) // config.get("patch_size", 14)
    is_clip = config.get("model_type") == "clip_vision_model"
    if not is_clip or its_grid != grid or width not in (None, its_width):
        raise ValueError(
            f"This CLIP vision model does not fit: found {kind} with {its_width} features on a "
            f"{its_grid}x{its_grid} grid, expected clip_vision_model with {width or WIDTH} "
            f"features on a {grid}x{grid} grid. Load CLIP ViT-L/14 at 224 pixels."
        )


def clip_vision_sizes(clip_vision) -> tuple[int, int, int]:
    """Width, layers and attention heads."""
    config = symbols.vision_config(clip_vision)
    return config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]


def encode_image(clip_vision, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 3, 224, 224) uint8 -> patch features (B, N, D) and image feature (B, D).

    The patches are as they leave the last layer, the image feature has the norm after it.
    """
    hidden = _last_hidden_state(clip_vision, pixels)
    image_feature = symbols.post_layernorm(clip_vision, hidden[:, 0]).float()
    return hidden[:, 1:], image_feature.to(hidden.device)


def class_token(clip_vision, pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, 224, 224) uint8 -> what leaves the last layer before the patches, (B, 1, D)."""
    return _last_hidden_state(clip_vision, pixels)[:, :1]


def _last_hidden_state(clip_vision, pixels: torch.Tensor) -> torch.Tensor:
    image = pixels.movedim(1, -1).float() / 255
    return symbols.last_hidden_state(clip_vision, image).float()


def normed(clip_vision, features: torch.Tensor) -> torch.Tensor:
    """The norm after CLIP vision's last layer, in fp32 and where the features lie."""
    symbols.load_clip_vision(clip_vision)
    return symbols.post_layernorm(clip_vision, features).to(features)


def project_image(clip_vision, features: torch.Tensor) -> torch.Tensor | None:
    """Normed features (..., D) in CLIP's common space (..., P), where they lie.

    None where CLIP vision has no projection into it.
    """
    project = symbols.visual_projection(clip_vision)
    if project is None or not _is_trained(project):
        return None
    symbols.load_clip_vision(clip_vision)
    return project(features.to(symbols.device_of(clip_vision))).to(features)


def vision_output(last_hidden_state: torch.Tensor, image_embeds: torch.Tensor):
    """The host's CLIP_VISION_OUTPUT of (B, N + 1, D) and (B, P)."""
    return symbols.VisionOutput(last_hidden_state, image_embeds)


def encode_text(clip, text: str, width: int | None = None) -> torch.Tensor:
    """Plain text -> CLIP's pooled, unprojected feature (1, T), of its first 77 tokens.

    Raises ValueError if T is not `width`.
    """
    pooled = symbols.unprojected_feature(clip, plain_tokens(clip, text))
    its_width = 0 if pooled is None else pooled.shape[1]
    if pooled is None or width not in (None, its_width):
        raise ValueError(
            f"This CLIP's text feature is {its_width} wide, the SemInpainter "
            f"expects {width}. Use the CLIP that belongs to the CAT file."
        )
    return pooled.float()


def text_similarity(clip, clip_vision, prompt) -> torch.Tensor | None:
    """Cosine of each cell's features and the text of a visual prompt in CLIP's common space.

    (B, N); None where one of the two has no projection into it.
    """
    if symbols.text_encoders(clip) != {"l"}:
        return None
    if not _is_trained(symbols.text_projection(clip)):
        return None
    cells = project_image(clip_vision, normed(clip_vision, prompt.after))
    text = symbols.pooled_feature(clip, plain_tokens(clip, prompt.text))
    if cells is None or cells.shape[2] != text.shape[1]:
        return None
    text = text.to(cells).view(1, 1, -1)
    return torch.nn.functional.cosine_similarity(cells, text, dim=2).cpu()


def _is_trained(projection) -> bool:
    """Whether a projection came with the file.

    The host leaves one that a file lacks as it finds the memory, by comfy/ops.py:535
    (reset_parameters), so its spread has to be a trained one's.
    """
    weight = getattr(projection, "weight", None)
    if weight is None:
        return False
    spread = weight.float().std().item() * weight.shape[1] ** 0.5
    return LEAST_SPREAD < spread < LARGEST_SPREAD


def plain_tokens(clip, text: str) -> dict[str, list]:
    """The first 77 tokens of a text as it is, for encode_from_tokens.

    No weights, no embeddings, no escapes, which the host would read in it.
    """
    _require_clip_l(clip)
    return {"l": [[(token, 1.0) for token in symbols.token_ids(clip, text)]]}


def left_out(clip, text: str) -> int:
    """How many tokens of a text plain_tokens has no room for."""
    _require_clip_l(clip)
    return symbols.tokens_left_out(clip, text)


def _require_clip_l(clip) -> None:
    """Raise ValueError unless this is the CLIP of an SD 1.5 checkpoint."""
    encoders = symbols.text_encoders(clip)
    if encoders != {"l"}:
        raise ValueError(
            f"This CLIP is not SD 1.5's: it has the text encoders {', '.join(sorted(encoders))}, "
            "expected l (CLIP ViT-L/14) alone. Use the CLIP of an SD 1.5 checkpoint."
        )
