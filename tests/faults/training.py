"""A tiny run that saves after every step; as a command, `python -m tests.faults.training WORKDIR`, to be killed."""

import sys

from tests.train.conftest import tiny_config  # first tests/conftest.py, which sets JAX's flags

STEPS = 12


def get_config():
    """The second stage of the tests' tiny run alone."""
    config = tiny_config()
    with config.unlocked():
        del config.stages.seeing
        config.schedule = ("answering",)
        config.loop.writers = ()
    config.stages.answering.steps = STEPS
    config.loop.update({"save_every": 1, "log_every": 1, "keep": 2})
    return config


def trainer(workdir, mesh):
    """Of the run, in a folder."""
    from vlm_jax.build import build
    from vlm_jax.train.loop import Trainer

    config = get_config()
    return Trainer(config, build(config), mesh, workdir)


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  # JAX's settings
    from tests.faults.conftest import first_device

    trainer(sys.argv[1], first_device()).run()
