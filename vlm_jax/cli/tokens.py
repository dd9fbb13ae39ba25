"""python -m vlm_jax.cli.tokens [--releases=NAME,DIR] [--sizes=1280x720,448x448] [--token_budget=N]

Prints the visual tokens that an image takes in each system, from its files alone: no weight is read.
"""

import re

from absl import app, flags

from vlm_jax.cli import numbers
from vlm_jax.cli.process import explained, quieten, show_flags
from vlm_jax.pretrained.token_counts import SIZES, count_all, markdown
from vlm_jax.processors.tiling import Size
from vlm_jax.ranges import Count

RELEASES = flags.DEFINE_list(
    "releases", None, "Names of included releases, or folders, with commas between; all included ones if unset."
)
SIZE_LIST = flags.DEFINE_list(
    "sizes", [f"{width}x{height}" for height, width in SIZES], "WIDTHxHEIGHT of images in pixels, with commas between."
)
TOKEN_BUDGET = numbers.define(
    "token_budget", Count, None, "Maximum visual tokens of an image, by fewer tiles or pixels; '-' where that fails."
)


def parse_sizes(words: list[str]) -> list[Size]:
    """(height, width) of each `WIDTHxHEIGHT`.

    Raises:
      app.UsageError: another form, or a side of 0 pixels.
    """
    found = [re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", word.strip()) for word in words]
    for word, sides in zip(words, found, strict=True):
        if sides is None:
            raise app.UsageError(f"--sizes: expected WIDTHxHEIGHT in pixels, such as 1280x720, got '{word}'")
    return [(int(sides[2]), int(sides[1])) for sides in found if sides is not None]


def main(argv: list[str]) -> None:
    """Prints the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument: {argv[1]}")
    sizes = parse_sizes(SIZE_LIST.value)
    quieten()
    with explained():
        print(markdown(count_all(RELEASES.value, sizes, TOKEN_BUDGET.value), sizes), end="")


if __name__ == "__main__":
    show_flags()
    app.run(main)
