"""What the demo model reads: names of things, in English and Chinese, alone or in captions."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

LANGUAGES = ("english", "chinese")
STYLE_WORDS = (("3d", "flat", "cartoon"), ("立体", "扁平", "卡通"))  # by language, as STYLES
# How a name is asked for: most people write it alone.
_TEMPLATES = (("{}", "{}", "a {}", "a picture of a {}"), ("{}", "{}", "一个{}", "{}的图片"))
_STYLED = ("{style} {name}", "{style}{name}")
_BETWEEN = (",", "、")
_AFTER_STYLE = (":", "\uff1a")  # the second one as wide as a Chinese character
LENGTH = 77  # tokens of a text
_START = 49406
_END = 49407

Tokenize = Callable[[str], list[int]]  # a text -> its LENGTH tokens


class Texts:
    """The tokens of every name and caption.

    Args:
        names: English and Chinese name of each thing.
        tokenize: the host's tokenizer.
    """

    def __init__(self, names: Sequence[tuple[str, str]], tokenize: Tokenize):
        self.asked: list[list[torch.Tensor]] = []  # by language and template, (N, 77)
        self.styled: list[torch.Tensor] = []  # by language, (3 N, 77), style by style
        self.words: list[list[list[int]]] = []  # by language and thing, without start and end
        self.marks: list[list[int]] = []  # by language: between things, after a style
        self.style_words: list[list[list[int]]] = []
        for language in range(len(LANGUAGES)):
            own = [both[language] for both in names]
            self.asked.append([])
            for template in _TEMPLATES[language]:
                texts = [tokenize(template.format(name)) for name in own]
                self.asked[-1].append(torch.tensor(texts))
            styled = []
            for word in STYLE_WORDS[language]:
                for name in own:
                    styled.append(tokenize(_STYLED[language].format(style=word, name=name)))
            self.styled.append(torch.tensor(styled))
            self.words.append([_inner(tokenize(name)) for name in own])
            self.style_words.append([_inner(tokenize(word)) for word in STYLE_WORDS[language]])
            marks = (_BETWEEN[language], _AFTER_STYLE[language])
            self.marks.append([_inner(tokenize(mark)) for mark in marks])

    def labels(self, things: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        """A name each (B, 77), in either language and any of the forms."""
        rows = []
        for thing in things:
            forms = self.asked[rng.integers(len(LANGUAGES))]
            rows.append(forms[rng.integers(len(forms))][thing])
        return torch.stack(rows)

    def captions(
        self, things: np.ndarray, styles: np.ndarray, rng: np.random.Generator
    ) -> torch.Tensor:
        """A caption each (B, 77): all things of the picture (B, K), half the time its style."""
        rows = []
        for in_picture, style in zip(things, styles, strict=True):
            language = rng.integers(len(LANGUAGES))
            between, after_style = self.marks[language]
            tokens: list[int] = []
            if rng.random() < 0.5:
                tokens += self.style_words[language][style] + after_style
            named = rng.permutation(in_picture[in_picture >= 0])
            for place, thing in enumerate(named):
                tokens += between if place else []
                tokens += self.words[language][thing]
            rows.append(_whole(tokens))
        return torch.tensor(rows)


def _inner(tokens: Sequence[int]) -> list[int]:
    """Without start, end and what fills the text up."""
    return [token for token in tokens if token not in (_START, _END)]


def _whole(tokens: Sequence[int]) -> list[int]:
    tokens = [_START, *tokens[: LENGTH - 2]]
    return tokens + [_END] * (LENGTH - len(tokens))


def encode_texts(
    clip_text: nn.Module, tokens: torch.Tensor, length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the host makes of tokens (B, 77), differentiable.

    Args:
        length: of the longest text, where the caller has no use for what follows it: attention is
            causal.
    Returns:
        What the U-Net's cross-attention reads (B, L, T), and the pooled feature (B, T).
    """
    model = clip_text.text_model
    ends = (tokens == _END).int().argmax(1)
    tokens = tokens[:, :length]
    embedded = model.embeddings.token_embedding(tokens)
    x = embedded + model.embeddings.position_embedding.weight[: tokens.shape[1]]
    future = x.new_full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
    x = model.final_layer_norm(model.encoder(x, mask=future)[0])
    return x, x[torch.arange(len(x), device=x.device), ends]


def longest(tokens: torch.Tensor) -> int:
    """The length of the longest of some texts (B, 77), its end included."""
    return int((tokens == _END).int().argmax(1).max()) + 1
