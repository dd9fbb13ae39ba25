"""Ranges of numbers, stated in the types of settings: `rank: Annotated[int, Range(0, 1024)]`.

Every numeric field of a settings class or of a module that a config describes has one. `config.convert` checks them,
for sections of a config and for settings classes; `cli.numbers` for flags of the command line.
"""

import dataclasses
import math
import typing
from typing import Annotated, Any

Number = int | float
LARGE = 2**15  # an upper bound that only protects from overflow and lack of memory


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number; NaN is in no range.

    Attributes:
      least, most: smallest and largest value; None for no bound.
      above, below: bounds that are not values themselves.
      infinite: whether an infinite number within the bounds is a value.
      also: a value outside the bounds with a meaning of its own, as -1 for "the rest".
      note: what else errors say, as the value for "none".
    """

    least: Number | None = None
    most: Number | None = None
    above: Number | None = None
    below: Number | None = None
    infinite: bool = False
    also: int | None = None
    note: str = ""

    def __contains__(self, value: Number) -> bool:
        if self.also is not None and value == self.also:
            return True
        try:
            size = abs(float(value))
        except OverflowError:  # a whole number with no float near it
            return False
        if math.isnan(size) or (math.isinf(size) and not self.infinite):
            return False
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def broken_by(self, value: Number) -> str:
        """The range as text, without an upper bound that is no news to a value below it."""
        is_news = self.most is None or self.most < LARGE or not value <= self.most
        return str(self if is_news else dataclasses.replace(self, most=None))

    def __str__(self) -> str:
        words = []
        if self.least is not None:
            words.append(f"at least {self.least:,}")
        if self.above is not None:
            words.append(f"above {self.above:,}")
        if self.most is not None:
            words.append(f"at most {self.most:,}")
        if self.below is not None:
            words.append(f"below {self.below:,}")
        said = " and ".join(words) or "a finite number"
        said = said if self.also is None else f"{said}, or {self.also}"
        return f"{said} ({self.note})" if self.note else said


INT32 = 2**31 - 1  # steps, positions and ids are int32

Count = Annotated[int, Range(1, INT32)]
Natural = Annotated[int, Range(0, INT32)]
Index = Annotated[int, Range(-INT32, INT32)]  # one from the end is negative
Size = Annotated[int, Range(1, 2**24)]  # of an axis of an array
Depth = Annotated[int, Range(1, 1000)]  # number of layers
Side = Annotated[int, Range(1, 2**15)]  # of an image, a patch, a block or a window
PatchSide = Annotated[int, Range(1, 256)]  # of a packed patch, whose pixels are held as one vector
Few = Annotated[int, Range(1, 16)]  # of frames of a packed patch, and patches of a side of its block
Seed = Annotated[int, Range(0, 2**32 - 1)]  # of grain's shuffles and NumPy's generators
Finite = Annotated[float, Range()]
Bytes = Annotated[int, Range(1, 2**50)]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(0)]
Decay = Annotated[float, Range(0, below=1)]  # of a moving average
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(most=1, above=0)]


def split(hint: Any) -> tuple[Any, list[Range]]:
    """A type hint without its outer annotation, and the ranges in that."""
    if typing.get_origin(hint) is not Annotated:
        return hint, []
    base, *more = typing.get_args(hint)
    return base, [one for one in more if isinstance(one, Range)]
