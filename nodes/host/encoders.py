"""The frozen networks of training, run by the host: CLIP, its text encoder and the VAE."""

import torch

from .clip import encode_image, encode_text, plain_tokens


class HostEncoders:
    """`cat_core.training.samples.Encoders` on the host's CLIP_VISION, CLIP, VAE and MODEL."""

    def __init__(self, clip_vision, clip, vae=None, model=None):
        self.clip_vision, self.clip, self.vae, self.model = clip_vision, clip, vae, model
        self.texts: dict[tuple[str, str], torch.Tensor] = {}  # labels repeat

    def image(self, pixels):
        return tuple(x.cpu() for x in encode_image(self.clip_vision, pixels))

    def text(self, texts):
        return torch.cat(
            [self._once("text", text, lambda text: encode_text(self.clip, text)) for text in texts]
        )

    def context(self, texts):
        def encode(text):
            return self.clip.encode_from_tokens(plain_tokens(self.clip, text))

        return torch.cat([self._once("context", text, encode) for text in texts])

    def latent(self, image):
        latent = self.vae.encode(((image + 1) / 2).movedim(1, -1))
        return self.model.model.process_latent_in(latent).cpu()

    def _once(self, kind, text, encode):
        if (kind, text) not in self.texts:
            if len(self.texts) > 10_000:
                self.texts.clear()
            self.texts[kind, text] = encode(text).float().cpu()
        return self.texts[kind, text]
