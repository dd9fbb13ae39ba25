"""Targets with a fault each, which the harness has to find."""

import os
import time

from tests.fuzz.target import Target


def _on(number, fault):
    def read(value):
        if value == number:
            fault()
        if value % 2:
            raise ValueError("documented")

    return Target(lambda rng: rng.randrange(50), read, (ValueError,))


def _raise():
    raise KeyError("undocumented")


def _grow():
    bytearray(700 << 20)[:: 1 << 12] = b"x" * (700 << 8)


TARGETS = {
    "sound": _on(-1, _raise),
    "raises": _on(7, _raise),
    "hangs": _on(7, lambda: time.sleep(60)),
    "dies": _on(7, lambda: os._exit(3)),
    "grows": _on(7, _grow),
}
