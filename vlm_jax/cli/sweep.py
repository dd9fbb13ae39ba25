"""python -m vlm_jax.cli.sweep --config=configs/sweeps/X.py --workdir=DIR [--only=LABEL,LABEL]"""

from absl import flags

from vlm_jax.cli import command
from vlm_jax.sweep.run import Sweep

ONLY = flags.DEFINE_list("only", [], "Labels of the points to run, as pool@16; all when empty.")


def main() -> None:
    """Sweeps connectors and budgets; see `vlm_jax.sweep.run`."""
    Sweep(
        command.CONFIG.value,
        command.workdir(),
        config_path=command.config_path(),
        only=tuple(ONLY.value),
        overrides=command.overrides(),
    ).run()


if __name__ == "__main__":
    command.run(main)
