"""A count of compiled programs, by which a time that includes compilation is told from one that does not."""

import functools
import threading

import jax

EVENT = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Counts the programs that this process has compiled, or read from the compilation cache."""

    def __init__(self):
        self._lock, self._count = threading.Lock(), 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def count(self) -> int:
        """The number so far."""
        with self._lock:
            return self._count

    def _heard(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == EVENT:
            with self._lock:
                self._count += 1


@functools.cache
def compilations() -> Compilations:
    """The counter of this process; listeners stay registered."""
    return Compilations()
