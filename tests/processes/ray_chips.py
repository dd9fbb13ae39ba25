"""Tasks on a Ray cluster of one host with four pretended TPU chips; prints what came of each as JSON lines."""

import dataclasses
import functools
import json
import logging
import os
import sys
import time

import ray

EARLY = "jax" in sys.modules  # a worker imports this module when it reads its task

from vlm_jax.config import ConfigError  # noqa: E402
from vlm_jax.sweep.executor import Task  # noqa: E402
from vlm_jax.sweep.on_ray import RaySettings, ray_executor  # noqa: E402


def seen(label, report):
    """The environment of the task, when it ran, and whether JAX was imported before the task was read."""
    begun = time.time()
    report(label, 1, "")
    time.sleep(1)
    return {"environment": dict(os.environ), "begun": begun, "ended": time.time(), "early": EARLY}


def failing(report):
    raise ConfigError("no such key")


def main():
    logging.basicConfig(level=logging.INFO, force=True)  # absl has given the root a handler
    ray.init(address="local", num_cpus=8, resources={"TPU": 4}, object_store_memory=80 * 2**20)
    tasks = [Task(f"seen {number}", functools.partial(seen, f"seen {number}")) for number in range(4)]
    tasks.append(Task("failing", failing, ("seen 0", "seen 3")))
    with ray_executor(RaySettings(chips_per_point=2)) as executor:
        for ended in executor.run(tasks, lambda run, done, note: None):
            error = ended.error and f"{type(ended.error).__name__}: {ended.error}"
            print(json.dumps({**dataclasses.asdict(ended), "error": error}), flush=True)


if __name__ == "__main__":
    from tests.processes import ray_chips  # so that workers find its functions by this name

    ray_chips.main()
