"""The order of a decoder's layers of several kinds: what repeats in it is scanned, and compiled once."""

import functools
from collections.abc import Sequence
from typing import NamedTuple


class Stack(NamedTuple):
    """A stack of blocks of one kind, in the order of its layers.

    Attributes:
      name: of the module.
      layers: numbers of its layers in the decoder.
    """

    name: str
    layers: range


def stacks_of(kinds: Sequence[str], *, interleaved: bool = True) -> tuple[Stack, ...]:
    """The stacks of layers of these kinds, such that few blocks are compiled.

    A stack is named by the kind and number of its first layer; where its layers are every n-th ones, as those of one
    place in a period of n layers, by n too: `local_0_every_6`.

    Args:
      kinds: of every layer, a name without digits at its end.
      interleaved: whether layers of several kinds may repeat as a period; else only consecutive ones are a stack.
    """
    found = []
    for first, period, repeats in periods(tuple(kinds), 1 if not interleaved else len(kinds)):
        for place in range(first, first + period):
            step = f"_every_{period}" if period > 1 else ""
            layers = range(place, first + period * repeats, period)
            found.append(Stack(f"{kinds[place]}_{place}{step}", layers))
    return tuple(found)


@functools.lru_cache
def periods(order: tuple[str, ...], longest: int | None = None) -> tuple[tuple[int, int, int], ...]:
    """Divides a sequence into parts that repeat, so that the sum of their periods is least.

    Of several such divisions, the one with the fewest parts is taken; of those, the one with the longest first part.

    Args:
      order: what is at every place.
      longest: bound of a period; none when None.

    Returns:
      (first place, period, repeats) of every part, in order; a part with a period above 1 repeats.
    """
    # Of the last places, none at first: sum of the periods, number of parts, and the parts.
    best: list[tuple[int, int, tuple[tuple[int, int, int], ...]]] = [(0, 0, ())]
    for first in reversed(range(len(order))):
        left = len(order) - first
        choices = []
        for period in range(1, min(left, longest or left) + 1):
            repeats, part = 1, order[first : first + period]
            while True:
                if period == 1 or repeats > 1:
                    length, count, rest = best[left - period * repeats]
                    choices.append((length + period, count + 1, ((first, period, repeats), *rest)))
                following = first + period * repeats
                if order[following : following + period] != part:
                    break
                repeats += 1
        best.append(min(choices, key=lambda choice: (*choice[:2], -choice[2][0][1] * choice[2][0][2])))
    return best[-1][2]
