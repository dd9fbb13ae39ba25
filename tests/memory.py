"""The memory that a function takes, by the kernel's count for this process."""

import re
from collections.abc import Callable
from pathlib import Path

_PROCESS = Path("/proc/self")


def peak_bytes(run: Callable[[], object]) -> int:
    """Resident bytes at the highest point of a call, beyond those before it."""
    (_PROCESS / "clear_refs").write_text("5")  # the peak begins anew
    before = _count("VmRSS")
    run()
    return _count("VmHWM") - before


def _count(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", (_PROCESS / "status").read_text())
    assert found is not None
    return int(found[1]) * 1024
