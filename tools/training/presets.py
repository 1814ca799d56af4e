"""Choices for cards of some sizes: what fits by count, see counts.py and docs/training.md."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RESERVE = 2.0  # GB that PyTorch, the driver and what no count sees are granted

# Dense bf16 peaks in TFLOP/s, by a part of the name that the driver gives.
PEAKS = {"RTX 3060": 25.6, "RTX 4090": 165.0, "A100": 312.0, "H100": 989.0, "H200": 989.0}


@dataclass(frozen=True)
class Preset:
    """What to choose on a machine of some cards.

    Stages that are not in `micro_batch_size` do not fit.
    """

    card: str  # for example
    gigabytes: int  # of each card
    micro_batch_size: Mapping[str, int]
    cards: int = 1
    plain: frozenset[str] = frozenset()  # stages that keep their activations
    eight_bit: frozenset[str] = frozenset()  # stages whose AdamW has states of 8 bits
    is_cached: bool = True
    others: Mapping[str, Any] = field(default_factory=dict)  # option -> value, for all stages

    @property
    def tflops(self) -> float:
        """bf16 peak of all cards."""
        return PEAKS[self.card] * self.cards


ALL = ("sem-inpainter", "unet", "ref-adapter", "ref-adapter-unet", "ref-adapter-observed")
ALL += ("ref-adapter-lora", "cascade-sem-inpainter", "cascade")

PRESETS = {
    "12gb": Preset(
        "RTX 3060",
        12,
        {"sem-inpainter": 8, "ref-adapter": 4, "ref-adapter-lora": 4},
        # Sheets of samples keep CLIP and VAE on the card.
        others={"samples_every": 0},
    ),
    "24gb": Preset(
        "RTX 4090",
        24,
        {**dict.fromkeys(ALL, 8), "sem-inpainter": 16, "ref-adapter": 16, "ref-adapter-lora": 16}
        | {"cascade": 4},
        eight_bit=frozenset({"cascade"}),
        others={"samples_every": 0},
    ),
    "80gb": Preset(
        "A100",
        80,
        {**dict.fromkeys(ALL, 16), "sem-inpainter": 64, "ref-adapter": 32},
        plain=frozenset(ALL),
    ),
    # What the paper trains on takes terabytes as a cache.
    "8x80gb": Preset(
        "A100", 80, dict.fromkeys(ALL, 16), cards=8, plain=frozenset(ALL), is_cached=False
    ),
}


class PresetError(ValueError):
    """A preset that does not do; the message says why and what to do."""


def choices(name: str, stage: str) -> dict[str, Any]:
    """A preset's options for a stage, as tools/train.py's arguments call them.

    Raises:
        PresetError: by count, the stage does not fit such a card.
    """
    preset = PRESETS[name]
    if stage not in preset.micro_batch_size:
        fitting = ", ".join(preset.micro_batch_size)
        larger = [other for other, it in PRESETS.items() if stage in it.micro_batch_size]
        raise PresetError(
            f"--preset {name} is for cards of {preset.gigabytes} GB, on which {stage} does not fit "
            f"by count. Give --preset {larger[0]} on a larger card, or train one of {fitting}."
        )
    return {
        "precision": "bf16",
        "micro_batch_size": preset.micro_batch_size[stage],
        "checkpointing": stage != "sem-inpainter" and stage not in preset.plain,
        "use_8bit_adam": stage in preset.eight_bit,
        "is_cached": preset.is_cached,
        **preset.others,
    }


def refuse_smaller_card(name: str, card: str | None, gigabytes: float) -> None:
    """Raise PresetError for a preset whose choices are meant for a larger card.

    Args:
        card: what the driver calls it, None where there is none.
    """
    wanted = PRESETS[name].gigabytes
    by_hand = "leave it out and choose by hand; `tools/train.py plan` says what fits"
    if card is None:
        raise PresetError(
            f"--preset {name} is for a GPU of {wanted} GB, and there is none, or it is not used. "
            f"On a CPU {by_hand}."
        )
    # Drivers keep a little for themselves.
    if gigabytes < 0.9 * wanted:
        smaller = [other for other, it in PRESETS.items() if it.gigabytes * 0.9 <= gigabytes]
        instead = f"Give --preset {smaller[-1]}, or" if smaller else "On this card"
        raise PresetError(
            f"--preset {name} is for cards of {wanted} GB, {card} has {gigabytes:.1f} GB. "
            f"{instead} {by_hand}."
        )


def peak_of(card: str) -> float | None:
    """A card's bf16 peak in TFLOP/s, None where it is not known here."""
    for part, peak in PEAKS.items():
        if part in card:
            return peak
    return None
