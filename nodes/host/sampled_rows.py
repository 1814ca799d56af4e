"""Which latent each row of the U-Net's batch belongs to, and which rows are conditional.

Nothing that a patch is told says so for certain. A guider runs its prompts in any order, an area's
negative twin has the positive's id, context windows slice the batch, and other nodes cut tiles.
What holds are the guider's own names for its prompts when a sampling starts. There each prompt gets
a tensor with a number for each latent, which travels with the rows to the U-Net as its text does.
"""

from collections.abc import Callable

import torch

from ...cat_core.models.folded import UNCONDITIONAL, Run, runs_of
from . import symbols
from .messages import Sentence, say, sentence

KEY = "cat_diffusion"  # of our wrappers
ROWS = "cat_diffusion_rows"  # a latent's number for each row, or UNCONDITIONAL
SAMPLING = "cat_diffusion_sampling"  # the OneSampling that a patch is called in

# The stock guiders' names are positive, negative, empty_negative_prompt, and middle, which is
# cond2 of DualCFGGuider, comfy_extras/nodes_custom_sampler.py:850 (middle). More words are for
# guiders of other packs.
CONDITIONAL_NAMES = ("positive", "middle")
UNCONDITIONAL_WORDS = ("negative", "uncond", "empty", "null")

CELL = 8  # pixels of a latent of SD 1.5
TOO_LARGE = 1.5  # times the pictures that a model was trained on


class OneSampling:
    """What the adapters of a model have to know of one sampling.

    Args:
        schedule: the noise levels of the model that samples.
        conditional: ids of the conditions that look at the visual prompt; None outside of a
            sampling that we saw starting.
        latent_size: height and width of what is sampled, where that was seen.
    """

    def __init__(
        self,
        schedule,
        conditional: set | None = None,
        latent_size: tuple[int, int] | None = None,
    ):
        self.conditional = conditional
        self._latent_size = latent_size
        self._schedule = schedule
        self._levels: dict[float, float] = {}
        self._last_call: tuple[torch.Tensor | None, float] = (None, 0.0)  # sigmas, the highest
        self._runs: dict[tuple[int, ...], list[Run]] = {}
        self._said: set[str] = set()

    def is_between(self, start_percent: float, end_percent: float, extra_options: dict) -> bool:
        """Whether a call of the U-Net belongs to that part of the sampling."""
        sigmas = symbols.noise_levels(extra_options)
        if sigmas is None or (start_percent <= 0 and end_percent >= 1):
            return True
        level = self._highest(sigmas)
        return self._level_at(end_percent) <= level <= self._level_at(start_percent)

    def _highest(self, sigmas: torch.Tensor) -> float:
        """All blocks of a call get the same tensor: wait for its value on the GPU only once."""
        last_sigmas, level = self._last_call
        if last_sigmas is not sigmas:
            level = sigmas.max().item()
            self._last_call = (sigmas, level)
        return level

    def _level_at(self, percent: float) -> float:
        if percent not in self._levels:
            self._levels[percent] = symbols.sigma_at(self._schedule, percent)
        return self._levels[percent]

    def runs(self, extra_options: dict, rows: int, prompts: int) -> list[Run]:
        """Which rows of a call look at which of the visual prompts.

        Args:
            rows: B of the call.
            prompts: P of the adapter that asks.
        """
        latents = extra_options.get(ROWS)
        if latents is None:
            latents = self._by_chunk(extra_options, rows)
        if len(latents) != rows:
            latents = self._repeated(latents, rows, prompts)
        key = tuple(latents)
        if key not in self._runs:
            self._runs[key] = runs_of(key)
        return self._runs[key]

    def _by_chunk(self, extra_options: dict, rows: int) -> list[int]:
        """Latents by what the host tells every patch: equal chunks, one a condition.

        For calls of the U-Net outside of a guider's sampling, and for conditions that others make
        during one, such as those of comfy_extras/nodes_perpneg.py:54 (nocond), which nobody named
        positive.
        """
        chunks = symbols.chunks_of_batch(extra_options)
        size = max(rows // len(chunks), 1)
        latents: list[int] = []
        for kind, condition in chunks:
            if self.conditional is None:
                conditional = kind == symbols.POSITIVE
            else:
                conditional = condition in self.conditional
            latents += range(size) if conditional else [UNCONDITIONAL] * size
        if self.conditional is not None and max(latents) != UNCONDITIONAL:
            self._say_once(
                "missing",
                sentence(
                    "Another node keeps from the U-Net what tells its rows apart. Which of them "
                    "look at which visual prompt is taken from the ids of the prompts, latents in "
                    "order."
                ),
            )
        return latents

    def _repeated(self, latents: list[int], rows: int, prompts: int) -> list[int]:
        """Latents for another number of rows than travelled, as tiles under each other have."""
        looks = {UNCONDITIONAL if i == UNCONDITIONAL else i % prompts for i in latents}
        if len(looks) > 1:
            self._say_once(
                "other rows",
                sentence(
                    "Another node runs {rows} rows through the U-Net where the sampler has "
                    "{latents}. Which of them look at which visual prompt cannot be told; they "
                    "are taken to repeat in the sampler's order.",
                    rows=rows,
                    latents=len(latents),
                ),
            )
        times = -(-rows // len(latents))
        return (latents * times)[:rows]

    def say_where_too_large(self, picture_size: int | None) -> None:
        """Say once that the model was trained on far smaller pictures, of that side in pixels."""
        if picture_size is None or self._latent_size is None:
            return
        height, width = (CELL * side for side in self._latent_size)
        if max(height, width) >= TOO_LARGE * picture_size:
            self._say_once(
                "too large",
                sentence(
                    "{width}x{height} is too large for this model of {size}x{size} pixels: put CAT "
                    "Crop Around Mask before it.",
                    width=width,
                    height=height,
                    size=picture_size,
                ),
            )

    def _say_once(self, what: str, note: Sentence) -> None:
        if what not in self._said:
            self._said.add(what)
            say(note)


def watch_samplings(model) -> None:
    """Let rows travel in each sampling of a MODEL; once serves all its adapters."""
    symbols.wrap_sampling(model, KEY, _start, symbols.carry_to_patches(ROWS, _latents))


def sampling_of(extra_options: dict) -> OneSampling | None:
    """The sampling that a patch is called in; None outside of one that we saw starting."""
    return extra_options.get(SAMPLING)


def _start(executor: Callable, noise: torch.Tensor, *args, **kwargs):
    """Before a sampling: give each row of each condition its number."""
    guider = symbols.guider_of(executor)
    conditions = symbols.conditions_of(guider)
    latents = torch.arange(len(noise)).view(-1, 1, 1)
    conditional = set()
    for name, entries in conditions.items():
        looks = _looks(name, conditions)
        rows = latents if looks else torch.full_like(latents, UNCONDITIONAL)
        for condition in entries:
            symbols.let_travel(condition, ROWS, rows)
            if looks:
                conditional.add(symbols.condition_id(condition))
    schedule = symbols.noise_schedule(symbols.sampled_model(guider))
    height, width = noise.shape[-2:]
    sampling = OneSampling(schedule, conditional, latent_size=(height, width))
    symbols.tell_patches(guider, SAMPLING, sampling)
    return executor(noise, *args, **kwargs)


def _latents(rows: torch.Tensor) -> list[int]:
    return rows.flatten().tolist()


def _looks(name: str, conditions: dict[str, list[dict]]) -> bool:
    """Whether a guider's prompts of that name look at the visual prompt.

    A prompt between positive and negative, such as cond2 of DualCFGGuider, does, unless it is the
    negative prompt once more.
    """
    if name == "positive":
        return True
    if any(word in name for word in UNCONDITIONAL_WORDS):
        return False
    texts = _texts(conditions[name])
    positive = _texts(conditions.get("positive", []))
    negative = _texts(conditions.get("negative", []))
    is_negative = bool(texts) and texts <= negative and not texts <= positive
    if name not in CONDITIONAL_NAMES:
        if is_negative:
            note = sentence(
                "The guider calls a prompt {name!r}, which says neither positive nor negative: it "
                "does not look at the visual prompt.",
                name=name,
            )
        else:
            note = sentence(
                "The guider calls a prompt {name!r}, which says neither positive nor negative: it "
                "looks at the visual prompt.",
                name=name,
            )
        say(note)
    return not is_negative


def _texts(entries: list[dict]) -> set[int]:
    """The encoded texts of conditions, by identity."""
    return {id(symbols.condition_text(condition)) for condition in entries}
