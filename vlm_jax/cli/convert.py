"""python -m vlm_jax.cli.convert --source=DIR --target=DIR [--run=WORKDIR [--adapter]] [--dtype=bfloat16] [--dry-run]

Converts a released folder to Orbax arrays, and such arrays, or the parameters of a run, to a released folder.
"""

from absl import app, flags

from vlm_jax.cli.process import explained, quieten, show_flags
from vlm_jax.pretrained import FAMILIES
from vlm_jax.pretrained.convert import open_conversion, write_adapter
from vlm_jax.pretrained.loader import DTYPES

SOURCE = flags.DEFINE_string(
    "source",
    None,
    "A released folder, or organisation/name on the hub, to convert to Orbax arrays; or a converted folder.",
)
TARGET = flags.DEFINE_string("target", None, "A folder that does not exist yet; may be gs:// for Orbax arrays.")
RUN = flags.DEFINE_string(
    "run", None, "The workdir of a run of the source's model, whose parameters are written as a release."
)
ADAPTER = flags.DEFINE_bool(
    "adapter", False, "With --run: writes only its adapters (config.lora), as a folder that peft loads."
)
DTYPE = flags.DEFINE_enum("dtype", None, sorted(DTYPES), "Dtype of floating-point tensors; as stored if unset.")
DRY_RUN = flags.DEFINE_bool("dry-run", False, "Prints every tensor's conversion without reading or writing.")


def main(argv: list[str]) -> None:
    """Converts one folder; the direction is inferred from its format."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument: {argv[1]}")
    if not TARGET.value and not DRY_RUN.value:
        raise app.UsageError("--target: expected a folder to write; pass one, or --dry-run")
    source, target, run = SOURCE.value, TARGET.value, RUN.value
    quieten()
    with explained():
        if ADAPTER.value:
            if not (run and target) or DTYPE.value or DRY_RUN.value:
                raise app.UsageError("--adapter: expected --run and --target, without --dtype and --dry-run")
            written = write_adapter(str(source), FAMILIES, run, target)
            print(f"run -> peft: {run} -> {', '.join(map(str, written))}")
            return
        conversion = open_conversion(str(source), FAMILIES, dtype=DTYPE.value, run=run)
        print(f"{conversion.direction}: {run or source}" + (f" -> {target}" if target else ""), flush=True)
        if DRY_RUN.value:
            for way in conversion.ways():
                print(way)
        else:
            conversion.write(str(target))
        print(conversion.total)


if __name__ == "__main__":
    show_flags()
    flags.mark_flag_as_required("source")
    app.run(main)
