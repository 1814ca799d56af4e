"""The sections on a whole picture, and on what happens once for it."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from cat_diffusion.nodes.host.cat_model import run_sem_inpainter
from cat_diffusion.nodes.host.clip import encode_text
from cat_diffusion.nodes.visual_prompt import encode_visual_prompt

from .adapter_forms import PLAIN, SHIPPED
from .bench_models import PAPER_STEPS, TEXT, Bench
from .rows import Row, rows_in_turn
from .steps_in_turn import SamplingsInTurn


@dataclass
class PictureTimes:
    """Seconds of the parts of a picture, a value a picture."""

    shared: list[float] = field(default_factory=list)  # by both forms: CLIP text, VAE
    once: list[float] = field(default_factory=list)  # that CAT adds to them
    plain: list[float] = field(default_factory=list)  # all steps
    shipped: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)  # of each step to the plain one beside it

    def totals(self, title: str, factor: float = 1.0) -> list[Row]:
        """Rows of whole pictures, with so many times the sampling."""
        plain = []
        shipped = []
        for shared, steps in zip(self.shared, self.plain, strict=True):
            plain.append(shared + factor * steps)
        for shared, once, steps in zip(self.shared, self.once, self.shipped, strict=True):
            shipped.append(shared + once + factor * steps)
        reference = f"{title}, {PLAIN}"
        return rows_in_turn({reference: plain, f"{title}, {SHIPPED}": shipped}, reference)


def image(bench: Bench, arguments) -> Iterator[Row]:
    """Whole pictures: what both forms share, what CAT adds once, and the steps, taken in turn."""
    warm = {PLAIN: bench.model, SHIPPED: bench.apply(bench.see(*bench.picture(arguments.size)))}
    SamplingsInTurn(bench, warm, arguments.size, steps=1).draw()
    times = PictureTimes()
    for _ in range(arguments.images):
        _time_picture(bench, times, arguments.size, arguments.steps)

    title = f"{arguments.steps} steps"
    yield from times.totals(title)
    shared = "of that shared: CLIP text, VAE"
    yield Row(shared, "s", times.shared, note="measured once for both forms")
    yield Row("of that once: CLIP, SemInpainter, folding", "s", times.once)
    reference = f"of that the steps, {PLAIN}"
    steps = {reference: times.plain, f"of that the steps, {SHIPPED}": times.shipped}
    yield from rows_in_turn(steps, reference)
    yield Row("each step over the plain one beside it", "x", times.ratios)
    if arguments.steps != PAPER_STEPS:
        factor = PAPER_STEPS / arguments.steps
        for row in times.totals(f"{PAPER_STEPS} steps", factor):
            row.note = f"composed: sampling of {title} times {factor:g}"
            yield row


def _time_picture(bench: Bench, times: PictureTimes, size: int, steps: int) -> None:
    """Add the seconds of one picture of each form."""
    bench.forget_conditioned()
    encode, _ = bench.timed(lambda: bench.conditioned(size))
    picture = bench.picture(size)
    once, shipped = bench.timed(lambda: bench.apply(bench.see(*picture)))
    samplings = SamplingsInTurn(bench, {PLAIN: bench.model, SHIPPED: shipped}, size, steps)
    samplings.draw()
    decode = bench.seconds(lambda: bench.vae.decode(samplings.latents[SHIPPED]))

    plain_steps = samplings.seconds[PLAIN]
    shipped_steps = samplings.seconds[SHIPPED]
    times.shared.append(encode + decode)
    times.once.append(once)
    times.plain.append(sum(plain_steps))
    times.shipped.append(sum(shipped_steps))
    for plain, ours in zip(plain_steps, shipped_steps, strict=True):
        times.ratios.append(ours / plain)


def sem_inpainter(bench: Bench, arguments) -> Iterator[Row]:
    """The parts of a visual prompt, with the models loaded."""
    picture = bench.picture(arguments.size)
    config = bench.cat_model.architecture.sem_inpainter
    grid = config.grid_size
    inputs = (
        torch.randn(1, grid**2, config.hidden_size),  # patches
        torch.randn(1, config.hidden_size),  # image
        torch.randn(1, config.text_size),
        torch.ones(1, 1, grid, grid),  # all of it hidden
    )
    parts = {
        "CLIP vision, with preprocessing": lambda: encode_visual_prompt(bench.vision, *picture),
        "CLIP text": lambda: encode_text(bench.clip, TEXT),
        "SemInpainter": lambda: run_sem_inpainter(bench.cat_model, *inputs),
        "folding": bench.apply,
        "all of it": lambda: bench.apply(bench.see(*picture)),
    }
    for what, function in parts.items():
        yield Row(what, "s", bench.repeated(function))
