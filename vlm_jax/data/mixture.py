"""Endless streams that mix several sets by weight, each in epochs of its own."""

import dataclasses
import hashlib
import logging
import threading
from collections.abc import Sequence
from typing import Any

import grain

from vlm_jax.types import Fields

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Part:
    """One set of a mixture.

    Attributes:
      name: for the log, and the seed of its order.
      elements: random access to them.
      count: of them, in an epoch.
      weight: share of the stream's elements, relative to the other weights.
    """

    name: str
    elements: Any
    count: int
    weight: float


def mixed(parts: Sequence[Part], seed: int, *, log: bool = False) -> grain.MapDataset[Any]:
    """An endless stream of the elements of all parts: in every epoch of a part each of its elements once.

    Which part an element is from depends on its index and the weights, which element of the part on (seed, epoch).

    Args:
      parts: at least one.
      seed: of the orders.
      log: whether the start of every epoch of a part is logged.
    """
    streams = []
    for number, part in enumerate(parts):
        stream = grain.MapDataset.source(part.elements).seed(_seed(seed, part.name) if number else seed)
        stream = stream.shuffle().repeat()
        streams.append(stream.map_with_index(EpochLog(part.name, part.count)) if log else stream)
    return streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, [part.weight for part in parts])


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=4).digest())


class EpochLog:
    """Passes elements on, and logs the first that is read of every epoch; each process by itself."""

    def __init__(self, name: str, count: int):
        self._name, self._count, self._started = name, count, 0
        self._lock = threading.Lock()

    def __getstate__(self) -> Fields:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: Fields) -> None:
        self.__dict__ |= state
        self._lock = threading.Lock()

    def __call__(self, index: int, element: Any) -> Any:
        epoch = index // self._count + 1
        if epoch > self._started:
            with self._lock:
                begins, self._started = epoch > self._started, max(epoch, self._started)
            if begins:
                _log.info("config.data.%s: epoch %d of %d records begins", self._name, epoch, self._count)
        return element
