"""One of four hosts that train, each with a replica: `python -m tests.faults.hosts WORKDIR COPIES PORT INDEX`."""

import os
import sys
import time

import tests.conftest  # noqa: F401  # JAX's settings
from tests.faults.training import get_config
from tests.processes.conftest import environment

HOSTS, STEPS, COPY_EVERY = 4, 60, 4
SECONDS = 0.1  # of a step at least: the run must not end before the test kills a process


def main(workdir: str, copies: str, port: str, index: str) -> None:
    import jax

    os.environ["XLA_FLAGS"] = environment(1)["XLA_FLAGS"]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", HOSTS, int(index))
    from vlm_jax.build import build
    from vlm_jax.sharding.mesh import MeshSettings, make_mesh
    from vlm_jax.train.loop import Trainer

    config = get_config()
    with config.unlocked():
        config.stages.answering.steps = STEPS
        # No checkpoint before the end: only a copy can have the state.
        config.loop.update({"save_every": 1000, "copy_every": COPY_EVERY, "watchdog": 15.0})
        config.loop.local_copies = copies
    mesh = make_mesh(MeshSettings(data=HOSTS))
    Trainer(config, build(config), mesh, workdir, progress=lambda *_: time.sleep(SECONDS)).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
