"""One of two hosts, each with a replica: `python -m tests.faults.copying FOLDER PORT INDEX`.

It saves copies of a state, reads them, and reads them again after a bit of a value has changed.
"""

import json
import os
import pathlib
import sys

import tests.conftest  # noqa: F401  # JAX's settings
from tests.processes.conftest import environment


def state(mesh, seed):
    """Values of every kind that a sum with zeros, by which Orbax passes them on, could change."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    draw = np.random.default_rng(seed)
    values = {
        "moments": np.array([1e-40, -1e-45, 3.4e38, -0.0, np.inf, np.nan, *draw.standard_normal(2)], np.float32),
        "kernel": draw.standard_normal((4, 8)).astype("bfloat16"),
        "step": np.asarray(2**31 - 1, np.int32),
    }
    specs = {"moments": PartitionSpec(), "kernel": PartitionSpec("fsdp", None), "step": PartitionSpec()}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    arrays = {
        name: jax.make_array_from_callback(value.shape, shardings[name], lambda index, value=value: value[index])
        for name, value in values.items()
    }
    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name]) for name, x in arrays.items()}
    return values, arrays, like


def same(found, values) -> list[str]:
    """Names of the arrays with other values, where those too small for a normal number count as zeros."""
    import numpy as np

    def plain(x):
        x = np.asarray(x)
        if x.dtype.kind in "iu":
            return x
        x = x.astype(np.float32)
        return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)

    return [
        name
        for name, value in values.items()
        for shard in found[name].addressable_shards
        if not np.array_equal(plain(shard.data), plain(value[shard.index]), equal_nan=True)
    ]


def main(folder: pathlib.Path, port: str, index: int) -> None:
    import jax

    os.environ["XLA_FLAGS"] = environment(2)["XLA_FLAGS"]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    from vlm_jax.checkpoints import local_copies
    from vlm_jax.checkpoints.verification import DamagedCheckpoint
    from vlm_jax.sharding.mesh import MeshSettings, make_mesh

    mesh = make_mesh(MeshSettings(data=2, fsdp=2))
    values, arrays, like = state(mesh, 0)
    steps, differing, told = [], [], ""

    def opened():
        copies = local_copies.LocalCopies(str(folder), "run", mesh, "data")
        steps.append(copies.latest())
        return copies

    copies = opened()
    for step in (3, 5):
        copies.save(step, arrays)
    copies.close()
    copies = opened()
    differing.append(same(copies.restore(5, like), values))
    # Values that differ from the stored checksums.
    sums = local_copies.merged_checksums
    local_copies.merged_checksums = lambda leaves, mesh: sums(jax.tree.leaves(arrays), mesh)
    copies.save(7, state(mesh, 1)[1])
    copies.close()
    local_copies.merged_checksums = sums
    copies = local_copies.LocalCopies(str(folder), "run", mesh, "data")
    try:
        copies.restore(7, like)
    except DamagedCheckpoint as error:
        told = str(error)
    steps.append(copies.latest())
    copies.save(6, arrays)
    copies.close()
    copies = opened()
    differing.append(same(copies.restore(6, like), values))
    copies.remove()
    print(json.dumps({"steps": steps, "differing": differing, "told": told}))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
