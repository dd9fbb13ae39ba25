"""Memory and time of the two-tower losses; see README.md for the question and the commands."""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vlm_jax.losses.exchange import EXCHANGES, distributed
from vlm_jax.losses.two_tower import LOSSES, locked_image, sigmoid_loss, softmax_loss


def full_sigmoid(image, text, *, scale, bias):
    """SigLIP's published pseudocode: the full matrix, differentiated by JAX."""
    labels = 2 * jnp.eye(len(image)) - jnp.ones((len(image), len(image)))
    return -jnp.sum(jax.nn.log_sigmoid(labels * (image @ text.T * scale + bias))) / len(image)


def full_softmax(image, text, *, scale, bias):
    """CLIP's published pseudocode: the full matrix, differentiated by JAX."""
    logits = image @ text.T * scale + bias
    both = [jnp.trace(jax.nn.log_softmax(logits, axis)) for axis in (0, 1)]
    return -sum(both) / (2 * len(image))


SINGLE = {
    "sigmoid, full matrix": full_sigmoid,
    "sigmoid": sigmoid_loss,
    "sigmoid, locked image": locked_image(sigmoid_loss),
    "softmax, full matrix": full_softmax,
    "softmax": softmax_loss,
}


def step(loss):
    """Value and gradients for features, scale and bias, in one program."""

    def total(image, text, scale, bias, teacher):
        parts = loss(image, text, scale=scale, bias=bias, **teacher)
        return jnp.sum(jnp.stack(jax.tree.leaves(parts)))

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3)))


def single(batch: int, width: int, rounds: int) -> None:
    """Every loss once per round, in turn, so that other load on the machine affects all equally."""
    rng = np.random.default_rng(0)
    towers = rng.normal(size=(2, batch, width)).astype(np.float32)
    towers /= np.linalg.norm(towers, axis=-1, keepdims=True)
    arguments = (jnp.asarray(towers[0]), jnp.asarray(towers[1]), jnp.float32(10), jnp.float32(-10), {})
    programs = {name: step(loss).lower(*arguments).compile() for name, loss in SINGLE.items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for program in programs.values():
        jax.block_until_ready(program(*arguments))
    for _ in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            seconds[name].append(time.perf_counter() - start)
    print(f"{batch} x {width}, float32, {rounds} rounds\n")
    print("| loss | temporaries | median | fastest |\n|---|---|---|---|")
    for name, program in programs.items():
        temporary = program.memory_analysis().temp_size_in_bytes / 1e6
        median, fastest = statistics.median(seconds[name]), min(seconds[name])
        print(f"| {name} | {temporary:.0f} MB | {median:.3f} s | {fastest:.3f} s |")


def memory(batch: int, width: int) -> None:
    """Compiles for 8 devices without running."""
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def spec(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P("data") if shape else P()))

    features = spec(batch, width)
    teacher = {"teacher_image_features": features, "teacher_text_features": features, "teacher_scale": spec()}
    print(f"{batch} x {width}, float32, {mesh.size} devices\n")
    print("| loss | exchange | temporaries | peak |\n|---|---|---|---|")
    for name, objective in LOSSES.items():
        for exchange in EXCHANGES:
            loss = step(distributed(name, mesh, exchange=exchange))
            extra = teacher if objective.has_teacher else {}
            program = loss.lower(features, features, spec(), spec(), extra).compile()
            sizes = program.memory_analysis()
            peak = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes
            print(f"| {name} | {exchange} | {sizes.temp_size_in_bytes / 1e6:.0f} MB | {peak / 1e6:.0f} MB |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["single", "memory"])
    parser.add_argument("--batch", type=int, help="default: 4,096 for single, 32,768 for memory")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if options.what == "single":
        single(options.batch or 4096, options.width, options.rounds)
    else:
        memory(options.batch or 32_768, options.width)
