"""What the program of new tokens reads and copies, from its compiled form."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.decoders.transformer import Transformer
from vlm_jax.generation.engine import decode, prefill, prepared
from vlm_jax.models.vlm import VLM
from vlm_jax.types import TEXT_SLOT, Batch

from ..parameters import drawn

WIDTH, HIDDEN, VOCAB, LENGTH, SLOTS = 48, 80, 96, 4, 36
KERNELS = {(WIDTH, WIDTH), (WIDTH, WIDTH // 2), (WIDTH, HIDDEN), (HIDDEN, WIDTH)}


def compiled(size, depth=3, by_layer=True):
    """The program, for `size` rows."""
    model = VLM(None, None, Transformer(VOCAB, WIDTH, depth, 4, 2, HIDDEN))
    rows = jnp.zeros((size, LENGTH), jnp.int32)
    batch = Batch(
        tokens=rows, positions=rows + jnp.arange(LENGTH)[None], segment_ids=rows + 1, visual_index=rows + TEXT_SLOT
    )
    params = nn.meta.unbox(drawn(jax.eval_shape(model.init, jax.random.key(0), batch)))["params"]
    params = prepared(params) if by_layer else params
    static, ends = {"model": model, "pad_id": 0}, np.zeros(0, np.int32)
    given = (batch, np.arange(size, dtype=np.int32), np.zeros(size, bool), {}, ends)
    state, _ = prefill({"params": params}, *given, cache_length=SLOTS, cache_dtype=None, mesh=None, **static)
    return decode.lower({"params": params}, state, {}, ends, np.int32(9), chunk=8, **static).compile()


def copied(program):
    """Shapes, without axes of one, of all that the program slices or copies out of other arrays."""
    pattern = r" = f32\[([\d,]+)\]\S* (?:dynamic-slice|slice|copy)\("
    found = re.findall(pattern, program.as_text())
    return {tuple(int(n) for n in shape.split(",") if n != "1") for shape in found}


@pytest.mark.parametrize("size", [1, 3])
def test_no_kernel_and_no_layer_of_the_cache_is_copied(size):
    rows = (size, 2) if size > 1 else (2,)
    cache = {(*rows, SLOTS, WIDTH // 4), (*rows, WIDTH // 4, SLOTS)}
    assert not (KERNELS | cache) & copied(compiled(size))
    assert KERNELS | cache <= copied(compiled(size, by_layer=False))  # what is looked for is found where it is
