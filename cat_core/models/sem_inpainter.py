"""SemInpainter: predicts the CLIP features of an object that is not in the picture yet."""

from typing import NamedTuple

import torch
from torch import nn

from ..config import SemInpainterConfig
from . import layers


class SemInpainterOutput(NamedTuple):
    """What SemInpainter predicts, before blending."""

    patches: torch.Tensor  # (B, G*G, D), no final norm
    image: torch.Tensor  # (B, D), post-layernormed; the visual prompt does without it
    label: torch.Tensor  # (B, D), no final norm; unused downstream


class Embeddings(nn.Module):
    """Adds each patch's position and whether it is masked: (B, N, D), (B, N) -> (B, N, D)."""

    def __init__(self, config: SemInpainterConfig, ops, **kwargs):
        super().__init__()
        self.position_embedding = ops.Embedding(config.grid_size**2, config.hidden_size, **kwargs)
        self.mask_embedding = ops.Embedding(2, config.hidden_size, **kwargs)

    def forward(self, patches, masked):
        # A host may compute in another type than it stores the embeddings in.
        positions = torch.arange(patches.shape[1], device=patches.device)
        return (
            patches
            + self.position_embedding(positions).to(patches)
            + self.mask_embedding(masked).to(patches)
        )


class Encoder(nn.Module):
    """A stack of pre-norm layers without a final norm: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: SemInpainterConfig, ops, attention, **kwargs):
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(config.num_hidden_layers):
            layer = layers.EncoderLayer(
                config.hidden_size,
                config.intermediate_size,
                heads=config.num_attention_heads,
                eps=config.layer_norm_eps,
                ops=ops,
                attention=attention,
                **kwargs,
            )
            self.layers.append(layer)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class SemInpainter(nn.Module):
    """The official `VisionFusionTransformer`, parameter for parameter.

    Args:
        config: sizes.
        ops: namespace with Linear, LayerNorm and Embedding.
        attention: function (q, k, v, heads) -> out, see `layers.attention`.
        kwargs: `device` and `dtype` of the parameters.
    """

    def __init__(self, config: SemInpainterConfig, ops=nn, attention=layers.attention, **kwargs):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embeddings = Embeddings(config, ops, **kwargs)
        self.encoder = Encoder(config, ops, attention, **kwargs)
        self.post_layernorm = ops.LayerNorm(width, eps=config.layer_norm_eps, **kwargs)
        self.label_mlp = layers.MLP(
            config.text_size, config.text_intermediate_size, width, ops, **kwargs
        )
        self.spatial_mlp = layers.MLP(width, config.spatial_intermediate_size, width, ops, **kwargs)
        self.global_mlp = layers.MLP(width, config.global_intermediate_size, width, ops, **kwargs)

    def forward(
        self,
        patches: torch.Tensor,
        image: torch.Tensor,
        text: torch.Tensor,
        patch_mask: torch.Tensor,
    ) -> SemInpainterOutput:
        """Predict the features of the whole picture from those of the picture with a hole.

        Args:
            patches: (B, G*G, D) CLIP patch features of the grey-filled picture, before
                post-layernorm.
            image: (B, D) CLIP's pooled image feature, post-layernormed, not projected.
            text: (B, T) CLIP's pooled text feature, not projected.
            patch_mask: (B, 1, G, G), 1 where the patch is to be repainted.
        """
        masked = patch_mask.flatten(1).long()  # (B, G*G)
        patches = self.spatial_mlp(self.embeddings(patches, masked))  # (B, G*G, D)
        image = self.global_mlp(image).unsqueeze(1)  # (B, 1, D)
        label = self.label_mlp(text).unsqueeze(1)  # (B, 1, D)
        x = torch.cat((image, patches, label), dim=1)  # (B, G*G + 2, D)
        x = self.encoder(x)
        return SemInpainterOutput(
            patches=x[:, 1:-1],
            image=self.post_layernorm(x[:, 0]),
            label=x[:, -1],
        )
