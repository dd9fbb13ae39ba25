"""What a training run prints: a live display on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any, Protocol, runtime_checkable

import rich.console
import rich.progress

from vlm_jax.sharding.processes import is_primary
from vlm_jax.sweep.progress import duration
from vlm_jax.train.writers import LEARNING_RATE
from vlm_jax.types import Fields


@runtime_checkable
class Progress(Protocol):
    """Prints the steps and evaluations of a run; a context manager."""

    def __enter__(self) -> "Progress": ...

    def __exit__(self, *error: Any) -> None: ...

    def __call__(self, step: int, steps: int, line: Fields) -> None:
        """After every write of the log, with its last line."""
        ...

    def tell(self, step: int, lines: list[str]) -> None:
        """After every evaluation."""
        ...

    def say(self, lines: list[str]) -> None:
        """Prints lines before or after the training."""
        ...


def open_progress() -> Progress:
    """That of this process's standard output; nothing is printed but by the primary process."""
    if not is_primary():
        return Silence()
    return Display() if sys.stdout.isatty() else Lines()


class Silence:
    """Prints nothing."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: Any) -> None: ...

    def __call__(self, step: int, steps: int, line: Fields) -> None: ...

    def tell(self, step: int, lines: list[str]) -> None:
        self.say([f"evaluation at step {step}", *lines])

    def say(self, lines: list[str]) -> None: ...


class Lines(Silence):
    """One line of text a write of the log, at once, for files."""

    def __init__(self):
        self._begun: tuple[float, int] | None = None

    def __call__(self, step: int, steps: int, line: Fields) -> None:
        now, left = time.monotonic(), ""
        if self._begun is None:
            self._begun = now, step
        elif step > self._begun[1]:
            left = f"  {duration((now - self._begun[0]) / (step - self._begun[1]) * (steps - step))} left"
        print(f"step {step}/{steps}  {line['stage']}  {described(line)}{left}", flush=True)

    def say(self, lines: list[str]) -> None:
        if lines:
            print("\n".join(lines), flush=True)


class Display:
    """A live display; names are printed as they are, not as markup."""

    def __init__(self):
        columns = (
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[note]}", markup=False),
        )
        self._console = rich.console.Console(markup=False, highlight=False)
        self._bar = rich.progress.Progress(*columns, console=self._console, speed_estimate_period=120)
        self._task = self._bar.add_task("training", total=None, note="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def __call__(self, step: int, steps: int, line: Fields) -> None:
        self._bar.update(self._task, total=steps, completed=step, description=line["stage"], note=described(line))

    def tell(self, step: int, lines: list[str]) -> None:
        self.say([f"evaluation at step {step}", *lines])

    def say(self, lines: list[str]) -> None:
        if lines:
            self._console.print("\n".join(lines), soft_wrap=True)


def described(line: Fields) -> str:
    """Loss, gradient norm, learning rates and speed, as text."""
    rates = [value for name, value in line.items() if name.startswith(LEARNING_RATE)]
    words = [f"loss {line['loss']:.4f}", f"gradient {line['grad_norm']:.3g}"]
    words.append("lr " + ", ".join(f"{rate:.2e}" for rate in dict.fromkeys(rates)))
    if "tokens_per_second" in line:
        words.append(f"{line['tokens_per_second']:.0f} tokens/s")
    if "mfu" in line:
        words.append(f"MFU {line['mfu']:.1%}")
    return "  ".join([*words, f"{line['seconds']:.3g} s/step"])
