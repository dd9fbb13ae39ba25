"""A stack of blocks in which some layers attend to whole images and the others inside windows."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.layers.attention import HEADS, Context
from vlm_jax.layers.block import REMAT_POLICIES, RematPolicy, TransformerBlock
from vlm_jax.layers.saliency import Heads, Saliency, segment_saliency
from vlm_jax.types import Config, PackedPatches, Params, Tree

Kind = Literal["full", "window"]


class Attended(NamedTuple):
    """Attention statistics of a stack's last layer.

    Attributes:
      saliency: attention that each token gets, float32.
      keys: keys of each token and head.
    """

    saliency: Float[Array, "B N"]
    keys: Float[Array, "B N K H"]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Layers as a repeated pattern and the remaining layers after it.

    Attributes:
      period: kinds of the layers of the pattern.
      repeats: number of repetitions.
      rest: kinds of the remaining layers.
    """

    period: tuple[Kind, ...]
    repeats: int
    rest: tuple[Kind, ...]


def schedule(kinds: tuple[Kind, ...]) -> Schedule:
    """The pattern with the fewest programs: one for every run of equal layers in the pattern and the rest.

    32 layers of which every eighth is full are four times (7 windowed, 1 full): two programs, as for 8
    layers or 80. Only an irregular list compiles more programs with more layers.
    """
    candidates = [Schedule(kinds, 1, ())]
    for length in range(1, len(kinds) + 1):
        period = kinds[:length]
        repeats = 1
        while kinds[repeats * length : (repeats + 1) * length] == period:
            repeats += 1
        candidates.append(Schedule(period, repeats, kinds[repeats * length :]))
    return min(candidates, key=lambda s: (len(runs(s.period)) + len(runs(s.rest)), len(s.period)))


def runs(kinds: tuple[Kind, ...]) -> list[tuple[Kind, int]]:
    """Consecutive layers of one kind: (kind, number of layers)."""
    found: list[tuple[Kind, int]] = []
    for kind in kinds:
        if found and found[-1][0] == kind:
            found[-1] = (kind, found[-1][1] + 1)
        else:
            found.append((kind, 1))
    return found


def restore_order(x: Float[Array, "*L B N D"], packed: PackedPatches) -> Float[Array, "*L B N D"]:
    """Features of packed patches in the processor's order, padding last.

    Args:
      x: one feature per patch of the sequence.
      packed: how the patches were laid out.
    """
    if packed.order is None:
        return x
    places = packed.order.reshape((1,) * (x.ndim - 3) + (*packed.order.shape, 1))
    return jnp.take_along_axis(x, places, axis=-2)


class WindowedStack(nn.Module):
    """`depth` blocks over packed patches, scanned, with the parameters of `TransformerStack`.

    A windowed layer attends inside blocks of `packed.window_length`, each holding whole windows: its attention costs
    N * window_length, not N * N. The layout is computed on the host (`processors.patches.pack_patches`), so that layers
    do not reorder tokens.

    Attributes:
      depth: number of blocks; 0 returns the input.
      block: keyword arguments of `TransformerBlock`.
      full_layers: indices of the layers that attend to a whole image; None for all.
      saliency: also returns the attention that each patch gets in the last layer: averaged over `heads`, or of
        all heads `joined` into one, and over the queries of the same segment (of the same window where the
        last layer is windowed), or from its class token alone where there is one.
      levels: numbers of the hidden states to return, in ascending order: 0 is the input, `depth` the last output.
      remat: as in `TransformerStack`.

    Source: Bai et al. 2025 (Qwen2.5-VL), section 2.1.1.
    """

    depth: int
    block: Config
    full_layers: tuple[int, ...] | None = None
    saliency: Saliency = "none"
    remat: RematPolicy = "none"
    levels: tuple[int, ...] = ()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        packed: PackedPatches,
        angles: Float[Array, "B N half"] | None = None,
        *,
        collect: bool = False,
    ) -> tuple[Float[Array, "B N D"], Float[Array, "L B N D"] | None, Attended | None]:
        """Returns the last output; the states of `levels`, or with `collect` all; and with `saliency` an `Attended`.

        Without levels and `collect` there are no states. They are [levels, B, N, D], or [depth + 1, B, N, D].

        Args:
          x: embeddings in the order of `packed`.
          packed: segments and windows; its patches are not used.
          angles: rotary angles of every patch, or None.
          collect: also returns the input of every block and the output of the last.

        Raises:
          ValueError: a layer outside the stack, windowed layers without windows in `packed`, or `saliency` without
            layers or with `collect`.
        """
        kinds = self._kinds()
        if self.saliency != "none" and (collect or not kinds):
            raise ValueError("saliency is of the last layer, without collected states: leave out `collect`")
        if not kinds:
            return x, x[None] if collect or self.levels else None, None
        if "window" in kinds and packed.window_ids is None:
            raise ValueError(
                f"layers {[i for i, kind in enumerate(kinds) if kind == 'window']} attend inside windows, "
                "but the patches were packed without windows: pass `window` to processors.patches.pack_patches"
            )
        # What is given may have adapters, which those at initialisation have not.
        given = self.has_variable("params", "layers")
        params = self.get_variable("params", "layers") if given else self.param("layers", self._init, x.shape[-1])
        params = nn.meta.unbox(params)
        layers = _Layers(TransformerBlock(**self.block, parent=None), self.remat, packed, angles, collect)
        state = _State.of(x, () if collect else self.levels)
        each = params, None if state.levels is None else self._slots()
        if self.saliency != "none":
            state, _ = self._planned(layers, each, state, kinds[:-1])
            own, slot = jax.tree.map(lambda leaf: leaf[-1], each)
            x, attended = layers.attended(state.x, own, kinds[-1], self.saliency)
            return x, state.after(x, slot).chosen(), attended
        state, hidden = self._planned(layers, each, state, kinds)
        return state.x, state.chosen() if hidden is None else hidden, None

    @staticmethod
    def _planned(layers: "_Layers", each: Tree, state: "_State", kinds: tuple[Kind, ...]) -> tuple["_State", Tree]:
        """The state after the first layers, of `kinds`, and all hidden states if collected."""
        if not kinds:
            return state, None
        each = jax.tree.map(lambda leaf: leaf[: len(kinds)], each)
        plan = schedule(kinds)
        split = len(plan.period) * plan.repeats
        if plan.repeats > 1:
            shape = (plan.repeats, len(plan.period))
            repeated = jax.tree.map(lambda leaf: leaf[:split].reshape(*shape, *leaf.shape[1:]), each)
            state, first = jax.lax.scan(lambda state, part: layers(state, part, plan.period), state, repeated)
        else:
            state, first = layers(state, jax.tree.map(lambda leaf: leaf[:split], each), plan.period)
        state, last = layers(state, jax.tree.map(lambda leaf: leaf[split:], each), plan.rest)
        if first is None:
            return state, None
        return state, jnp.concatenate([first.reshape(-1, *state.x.shape), last, state.x[None]])

    def _slots(self) -> jax.Array:
        """Of every layer the index in `levels` of its output, or the number of levels."""
        found = {level: slot for slot, level in enumerate(self.levels)}
        return jnp.asarray([found.get(layer + 1, len(self.levels)) for layer in range(self.depth)], jnp.int32)

    def _kinds(self) -> tuple[Kind, ...]:
        full = range(self.depth) if self.full_layers is None else self.full_layers
        if beyond := [i for i in full if not 0 <= i < self.depth]:
            raise ValueError(f"full_layers {beyond} are not among the layers 0 to {self.depth - 1}")
        return tuple("full" if i in full else "window" for i in range(self.depth))

    def _init(self, rng: jax.Array, width: int) -> Params:
        block = TransformerBlock(**self.block, parent=None)
        sample = jnp.zeros((1, 1, width))
        stacked = jax.vmap(lambda key: block.init(key, sample, None, Context("full"))["params"])(
            jax.random.split(rng, self.depth)
        )
        return nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: axes.LAYERS})


class _State(NamedTuple):
    """Tokens between layers.

    Attributes:
      x: the last output.
      levels: [levels + 1, B, N, D] outputs that are returned, the last of them overwritten by every other layer's; None
        where none are.
    """

    x: jax.Array
    levels: jax.Array | None

    @staticmethod
    def of(x: jax.Array, levels: tuple[int, ...]) -> "_State":
        """The state before the first layer."""
        if not levels:
            return _State(x, None)
        held = jnp.zeros((len(levels) + 1, *x.shape), x.dtype)
        return _State(x, held.at[0].set(x) if levels[0] == 0 else held)

    def after(self, x: jax.Array, slot: jax.Array | None) -> "_State":
        """The state after a layer with the output `x`."""
        if self.levels is None:
            return _State(x, None)
        return _State(x, jax.lax.dynamic_update_index_in_dim(self.levels, x, slot, 0))

    def chosen(self) -> jax.Array | None:
        """The states of the levels."""
        return None if self.levels is None else self.levels[:-1]


class _Layers:
    """Applies some layers to packed tokens; `collect` returns their inputs."""

    def __init__(
        self, block: nn.Module, remat: RematPolicy, packed: PackedPatches, angles: jax.Array | None, collect: bool
    ):
        def layer(x, params, context):
            return block.apply({"params": params}, x, None, context)[0]  # type: ignore[index]

        policy = None if remat == "none" else REMAT_POLICIES[remat]
        self._block, self._remat = block, remat
        self._layer = layer if remat == "none" else jax.checkpoint(layer, policy=policy, prevent_cse=False)
        self._collect, self._queries = collect, packed.class_tokens
        self._contexts = {"full": Context("full", packed.segment_ids, packed.segment_ids, angles=angles)}
        if packed.window_ids is not None:
            windows = packed.window_ids
            self._contexts["window"] = Context("full", windows, windows, angles=angles, block=packed.window_length)

    def attended(self, x: jax.Array, params: Params, kind: Kind, saliency: Saliency) -> tuple[jax.Array, Attended]:
        """Runs one layer and returns its output and attention statistics."""
        context = self._contexts[kind]

        def halves(x, params):
            run: Any = functools.partial(self._block.apply, {"params": params})
            (x, _), sown = run(x, None, context, half="attention", mutable=[HEADS])
            return run(x, None, context, half="feed_forward")[0], sown[HEADS]["attention"]

        if self._remat != "none":
            halves = jax.checkpoint(halves, policy=REMAT_POLICIES[self._remat], prevent_cse=False)
        x, sown = halves(x, params)
        heads = Heads(sown["queries"], sown["keys"])
        looking = heads.joined() if saliency == "joined" else heads
        return x, Attended(segment_saliency(looking, context, self._queries), heads.key)

    def __call__(self, state: _State, each: Tree, kinds: tuple[Kind, ...]) -> tuple[_State, Tree]:
        """Runs layers of `kinds` with stacked parameters and slots; returns the state and [layers, B, N, D] or None."""
        start = 0
        hidden: list[Tree] = [jnp.zeros((0, *state.x.shape), state.x.dtype)]
        for kind, count in runs(kinds):
            mine = jax.tree.map(lambda leaf, a=start, b=start + count: leaf[a:b], each)

            def body(before, layer, kind=kind):
                params, slot = layer
                after = before.after(self._layer(before.x, params, self._contexts[kind]), slot)
                return after, before.x if self._collect else None

            if count == 1:
                state, states = body(state, jax.tree.map(lambda leaf: leaf[0], mine))
                states = None if states is None else states[None]
            else:
                state, states = jax.lax.scan(body, state, mine)
            start += count
            hidden.append(states)
        return state, jnp.concatenate(hidden) if self._collect else None
