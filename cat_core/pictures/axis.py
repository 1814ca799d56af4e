"""Where a value lies on a picture: the one scale of all curves and histograms."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Axis:
    """A straight scale over pixels; `first` is larger than `last` where values grow upwards."""

    low: float
    high: float  # larger than low
    first: float  # pixel of the lowest value
    last: float  # pixel of the highest value

    def __call__(self, value: float) -> float:
        """The value's pixel, between two of them as a rule."""
        share = (value - self.low) / (self.high - self.low)
        return self.first + share * (self.last - self.first)

    def round_values(self) -> np.ndarray:
        """About five round numbers between the ends."""
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        candidates = power * np.array((1, 2, 5, 10))
        step = candidates[candidates >= rough][0]
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return step * np.arange(first, last + 1)
