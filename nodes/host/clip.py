"""The host's CLIP and CLIP_VISION: what they must be like, and their features."""

import comfy.model_management
import torch


def check_clip_vision(clip_vision, width: int | None = None, grid: int = 16) -> None:
    """Raise unless this is a CLIP ViT with that many features and patches."""
    config = getattr(clip_vision, "config", {})
    found_width, found_grid = (
        config.get("hidden_size"),
        config.get("image_size", 0) // config.get("patch_size", 14),
    )
    found = f"{config.get('model_type', 'unknown')} with {found_width} features on a {found_grid}x{found_grid} grid"
    if (
        config.get("model_type") != "clip_vision_model"
        or found_grid != grid
        or width not in (None, found_width)
    ):
        raise ValueError(
            f"This CLIP vision model does not fit: found {found}, expected clip_vision_model with "
            f"{width or 1024} features on a {grid}x{grid} grid. Load CLIP ViT-L/14 at 224 pixels."
        )


def clip_vision_sizes(clip_vision) -> tuple[int, int, int]:
    """Width, layers and attention heads."""
    return tuple(
        clip_vision.config[key]
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )


def encode_image(clip_vision, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 3, 224, 224) uint8 -> patch features (B, N, D) before, and image feature (B, D) after post-layernorm."""
    output = clip_vision.encode_image(pixels.movedim(1, -1).float() / 255, crop=False)
    hidden = output["last_hidden_state"].float()  # (B, N + 1, D)
    norm = clip_vision.model.vision_model.post_layernorm
    return hidden[:, 1:], norm(hidden[:, 0].to(clip_vision.load_device)).float().to(hidden.device)


def encode_text(clip, text: str, width: int | None = None) -> torch.Tensor:
    """Plain text -> CLIP's pooled, unprojected feature (1, T), of its first 77 tokens; raises if T is not `width`."""
    _, pooled = clip.encode_from_tokens(plain_tokens(clip, text), return_pooled="unprojected")
    if pooled is None or width not in (None, pooled.shape[1]):
        raise ValueError(
            f"This CLIP's text feature is {0 if pooled is None else pooled.shape[1]} wide, the SemInpainter "
            f"expects {width}. Use the CLIP that belongs to the CAT file."
        )
    return pooled.float()


def text_similarity(clip, clip_vision, prompt) -> torch.Tensor | None:
    """Cosine of each cell's features and the text of a visual prompt in CLIP's common space, (B, N).

    None where one of the two has no projection into it. The host leaves a projection that a file lacks as it finds the
    memory, so its spread has to be a trained one's, near 1 / sqrt(width).
    """
    transformer = (
        clip.cond_stage_model.clip_l.transformer if set(clip.tokenize("")) == {"l"} else None
    )
    projections = [
        getattr(transformer, "text_projection", None),
        getattr(clip_vision.model, "visual_projection", None),
    ]
    weights_ = [getattr(projection, "weight", None) for projection in projections]
    if any(
        weight is None or not 0.25 < weight.float().std().item() * weight.shape[1] ** 0.5 < 4
        for weight in weights_
    ):
        return None
    _, text = clip.encode_from_tokens(plain_tokens(clip, prompt.text), return_pooled=True)
    comfy.model_management.load_model_gpu(clip_vision.patcher)
    cells = (
        projections[1](
            clip_vision.model.vision_model.post_layernorm(prompt.after.to(clip_vision.load_device))
        )
        .float()
        .cpu()
    )
    if cells.shape[2] != text.shape[1]:
        return None
    return torch.nn.functional.cosine_similarity(cells, text.float().cpu().view(1, 1, -1), dim=2)


def plain_tokens(clip, text: str) -> dict[str, list]:
    """The first 77 tokens of a text as it is: no weights, no embeddings, no escapes, which the host would read in it."""
    encoders = set(clip.tokenize(""))
    if encoders != {"l"}:
        raise ValueError(
            f"This CLIP is not SD 1.5's: it has the text encoders {', '.join(sorted(encoders))}, expected l "
            "(CLIP ViT-L/14) alone. Use the CLIP of an SD 1.5 checkpoint."
        )
    ids = clip.tokenizer.clip_l.tokenizer(
        text, padding="max_length", truncation=True, max_length=77
    )["input_ids"]
    return {"l": [[(id, 1.0) for id in ids]]}
