"""Communication that no work hides, from the order in which a compiled program begins it and waits for it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from vlm_jax.costs.chips import Chip
from vlm_jax.planner.collectives import Collective
from vlm_jax.planner.program_text import Computation, Program


def exposed_seconds(
    program: Program, found: Sequence[Collective], work: Mapping[tuple[str, str], float], chip: Chip
) -> float:
    """Seconds of a step in which a chip waits for its links.

    Work between the start and the end of a collective hides as much of it; the rest is exposed. Links carry one
    collective at a time, so that work hides those that are under way in the order of their starts, and no work hides
    two.

    Args:
      program: in its schedule.
      found: its collectives.
      work: seconds of one run of an instruction, by the names of its computation and its own.
      chip: whose links carry them.
    """
    begun = defaultdict[str, dict[str, list[Collective]]](lambda: defaultdict(list))
    for one in found:
        begun[one.computation][one.start].append(one)
    spans, total = _Spans(program, work), 0.0
    for name, times in program.runs().items():
        own = program.computations[name]
        total += times * _exposed(own, begun[name], {one.name: spans.of(name, one.name) for one in own}, chip)
    return total


class _Spans:
    """Seconds of instructions, with all runs of the computations that loops, conditionals and calls run."""

    def __init__(self, program: Program, work: Mapping[tuple[str, str], float]):
        self._program, self._work = program, work
        self._found: dict[tuple[str, str], float] = {}

    def of(self, computation: str, name: str) -> float:
        """Of an instruction of a computation."""
        if (computation, name) not in self._found:
            own = self._program.computations[computation]
            for one in own:
                inner = self._program.inner(one, own)
                seconds = self._work.get((computation, one.name), 0.0)
                if inner is not None:
                    seconds += inner[1] * sum(
                        self.of(inner[0], line.name) for line in self._program.computations[inner[0]]
                    )
                self._found[computation, one.name] = seconds
        return self._found[computation, name]


def _exposed(
    own: Computation, begun: Mapping[str, Sequence[Collective]], spans: Mapping[str, float], chip: Chip
) -> float:
    """Seconds that one run of a computation waits."""
    exposed, under_way = 0.0, list[tuple[str, float]]()  # end and seconds left, in the order of the starts
    for one in own:
        ends = [end for end, _ in under_way]
        if one.name in ends:
            last = len(ends) - ends[::-1].index(one.name)
            exposed += sum(left for _, left in under_way[:last])
            under_way = under_way[last:]
        work = spans[one.name]
        for number, (end, left) in enumerate(under_way):
            under_way[number] = end, max(0.0, left - work)
            work = max(0.0, work - left)
        for collective in begun.get(one.name, ()):
            if collective.end is None:
                exposed += collective.seconds(chip)
            else:
                under_way.append((collective.end, collective.seconds(chip)))
    return exposed + sum(left for _, left in under_way)
