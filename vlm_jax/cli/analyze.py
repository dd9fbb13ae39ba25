"""python -m vlm_jax.cli.analyze --release=DIR --image=FILE [--image=FILE ...] --output=DIR

Looks inside the vision tower of a release: mean attention distance, similarity of positions, first filters, which
patches feed which visual token, and what reducers keep. Writes `report.html`, every figure as a PNG, and `arrays.npz`.
"""

from absl import app, flags

import vlm_jax
from vlm_jax.analysis.kept import CHOOSING
from vlm_jax.analysis.release import analyse_release
from vlm_jax.analysis.report import write_report
from vlm_jax.cli import numbers
from vlm_jax.cli.process import explained, keep_programs, quieten, show_flags
from vlm_jax.paths import absolute
from vlm_jax.pretrained.loader import DTYPES
from vlm_jax.ranges import Count, Size

RELEASE = flags.DEFINE_string("release", None, "A released folder, or organisation/name on the Hugging Face hub.")
IMAGE = flags.DEFINE_multi_string("image", [], "An image; repeatable. The first is drawn.")
OUTPUT = flags.DEFINE_string("output", None, "The folder of the report, local or gs://; created if missing.")
REDUCERS = flags.DEFINE_list(
    "reducers",
    ["random", "uniform_stride", "divprune"],
    f"Reducers whose choice is drawn, of {', '.join(CHOOSING)}; empty for none.",
)
TOKEN_BUDGET = numbers.define(
    "token_budget", Size, None, "Tokens that --reducers keep of an image, or of a tile; a quarter if unset."
)
IMAGE_SIZE = numbers.define("image_size", Size, None, "Side of the images in pixels; the release's if unset.")
PROJECTIONS = numbers.define(
    "projections", Count, 16, "Random projections by which the influence of patches on tokens is estimated."
)
COMPONENTS = numbers.define("components", Count, 28, "Principal components of the first filters.")
BATCH_SIZE = numbers.define("batch_size", Count, 1, "Images whose attention weights are in memory at a time.")
DTYPE = flags.DEFINE_enum("dtype", "float32", sorted(DTYPES), "Dtype of parameters and computation.")


def main(argv: list[str]) -> None:
    """Analyses a release and writes the report."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument: {argv[1]}")
    keep_programs()
    quieten()
    with explained(OSError):
        model = vlm_jax.from_pretrained(str(RELEASE.value), dtype=DTYPE.value, image_size=IMAGE_SIZE.value)
        analysis = analyse_release(
            model,
            list(IMAGE.value),
            reducers=REDUCERS.value,
            token_budget=TOKEN_BUDGET.value,
            num_projections=PROJECTIONS.value,
            num_components=COMPONENTS.value,
            batch_size=BATCH_SIZE.value,
        )
        print(write_report(analysis, absolute(str(OUTPUT.value))))


if __name__ == "__main__":
    show_flags()
    flags.mark_flags_as_required(["release", "image", "output"])
    app.run(main)
