"""Bytes over the busiest link for each kind of collective: closed forms on rings and tori of equal sides.

A link carries bytes in both directions at once; times follow from the busiest direction of the busiest link.
"""

from collections.abc import Sequence


def sent_bytes(kind: str, given: float, size: int) -> float:
    """Bytes that each of `size` chips sends, each to a neighbour or further, for an operand of `given` bytes on each.

    Source: Thakur et al. 2005, sections 4.1 to 4.4; Chan et al. 2007, table 2.
    """
    if kind == "all-gather":
        return given * (size - 1)
    if kind == "all-reduce":
        return 2 * given * (size - 1) / size
    if kind in ("collective-permute", "collective-broadcast"):
        return given
    return given * (size - 1) / size


def link_bytes(kind: str, given: float, size: int, dims: int = 1) -> float:
    """Bytes over the busiest direction of a link, for a collective of all of `size` chips.

    All-gather, reduce-scatter and all-reduce divide what a chip sends over both directions of `dims` rings, each
    direction of which carries its share from neighbour to neighbour. All-to-all: a part of `given / size` bytes for
    every other chip takes the shortest way. On a ring of s chips these ways are floor(s^2 / 4) hops for the parts of a
    chip, over 2 s directions of links for s chips: `given / s * floor(s^2 / 4) / 2`, about `given * s / 8`. On a torus
    every part also takes that many hops in each of the other dimensions, all at once, so that s is the side (as the
    channel load of tori in Dally and Towles 2004). A broadcast passes a half on in each direction.

    Args:
      kind: of `collectives.KINDS`, but for collective-permute.
      given: bytes of the operand on each chip.
      size: chips that take part.
      dims: dimensions of the torus.
    """
    if kind == "all-to-all":
        side = round(size ** (1 / dims)) if dims > 1 else size
        return given / side * (side**2 // 4) / 2
    if kind == "collective-broadcast":
        return given / 2
    return sent_bytes(kind, given, size) / (2 * dims)


def permuted_hops(pairs: Sequence[tuple[int, int]], rings: Sequence[Sequence[int]]) -> int:
    """Messages over the busiest direction of a link, where every pair takes the shortest way around its ring.

    A shift by one is one message over every link, in one direction; the other direction is idle. A shift by d of s
    chips is min(d, s - d) messages, since that many sources lie behind each link.

    Args:
      pairs: sources and targets.
      rings: devices in their order; both of a pair are in one.
    """
    places = {device: (number, place) for number, ring in enumerate(rings) for place, device in enumerate(ring)}
    loads: dict[tuple[int, int, int], int] = {}
    for source, target in pairs:
        (number, start), end = places[source], places[target][1]
        size = len(rings[number])
        ahead = (end - start) % size
        step, hops = (1, ahead) if ahead <= size - ahead else (-1, size - ahead)
        for hop in range(hops):
            link = number, (start + step * hop) % size, step
            loads[link] = loads.get(link, 0) + 1
    return max(loads.values(), default=0)
