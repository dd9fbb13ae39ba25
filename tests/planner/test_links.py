"""Bytes over links against messages that are sent one hop at a time around a ring."""

import collections

import numpy as np
import pytest

from vlm_jax.planner.links import link_bytes, permuted_hops, sent_bytes

WHOLE = 1024.0


@pytest.mark.parametrize("size", [2, 4, 8])
def test_rings_send_their_closed_forms(size):
    """A chip starts with its part, and passes on to its right what came from its left, until all have all parts."""
    held, sent = [{chip} for chip in range(size)], 0.0
    passed = list(range(size))
    while any(len(one) < size for one in held):
        passed = [passed[chip - 1] for chip in range(size)]
        for chip, part in enumerate(passed):
            held[chip].add(part)
        sent += WHOLE / size
    assert sent_bytes("all-gather", WHOLE / size, size) == pytest.approx(sent)
    assert sent_bytes("reduce-scatter", WHOLE, size) == pytest.approx(sent)  # the same, backwards
    assert sent_bytes("all-reduce", WHOLE, size) == pytest.approx(2 * sent)
    assert link_bytes("all-gather", WHOLE / size, size) == pytest.approx(sent / 2)  # a half in each direction
    assert link_bytes("all-reduce", WHOLE, size, dims=2) == pytest.approx(2 * sent / 4)


def torus_loads(sides):
    """Parts over each direction of each link, one from every chip to every other, by one dimension after another."""
    loads = collections.Counter()
    for source in np.ndindex(sides):
        for target in np.ndindex(sides):
            at = list(source)
            for dim, size in enumerate(sides):
                ahead = (target[dim] - at[dim]) % size
                ways = [(1, ahead), (-1, size - ahead)]
                shortest = [way for way in ways if way[1] == min(ahead, size - ahead)]
                for step, hops in shortest:  # both ways where they are equal, a half each
                    place = at[dim]
                    for _ in range(hops):
                        loads[(*at[:dim], place, *at[dim + 1 :], dim, step)] += 1 / len(shortest)
                        place = (place + step) % size
                at[dim] = target[dim]
    return loads


@pytest.mark.parametrize("sides", [(2,), (3,), (4,), (8,), (4, 4), (3, 3, 3)], ids=str)
def test_an_all_to_all_loads_its_links_as_messages_by_the_shortest_way(sides):
    size = int(np.prod(sides))
    loads = torus_loads(sides)
    assert link_bytes("all-to-all", WHOLE, size, len(sides)) == pytest.approx(WHOLE / size * max(loads.values()))


@pytest.mark.parametrize(("shift", "hops"), [(1, 1), (3, 3), (4, 4), (7, 1)])
def test_a_shift_loads_one_direction_of_its_links(shift, hops):
    pairs = [(chip, (chip + shift) % 8) for chip in range(8)]
    assert permuted_hops(pairs, [range(8)]) == hops
    assert permuted_hops(pairs[:1], [range(8)]) == 1 and permuted_hops([], [range(8)]) == 0
    apart = [(2 * source, 2 * target) for source, target in pairs]
    assert permuted_hops(apart, [range(0, 16, 2), range(1, 16, 2)]) == hops
