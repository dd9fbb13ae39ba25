"""What the language model of a whole system gives: the cases of a folder laid out as rows of one batch.

Every row is a prompt whose ids and visual rows are known; one program computes the logits of all, and another
one the greedy ids of all.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tests.golden.comparison import Golden
from vlm_jax.generation.engine import generate
from vlm_jax.losses.cross_entropy import cross_entropy
from vlm_jax.processors import patches
from vlm_jax.types import Batch, PackedPatches

IGNORED = -100  # label of what is not learned


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt.

    Attributes:
      tokens: ids [T], any where a visual token is.
      visual_index: rows of the visual table [T], -1 for text.
      images: pixels [I, height, width, channels], or patches of images of any size, or None.
    """

    tokens: np.ndarray
    visual_index: np.ndarray
    images: "np.ndarray | Patches | None" = None

    def __len__(self) -> int:
        return len(self.tokens)


Choose = Callable[[Any, Mapping[str, Row], int], dict[str, np.ndarray]]


class Patches(NamedTuple):
    """Rows of `PackedPatches.patches` in the processor's order, and the (frames, rows, columns) of every image."""

    patches: np.ndarray
    grids: np.ndarray


def text(ids: np.ndarray) -> Row:
    """A prompt without an image."""
    return Row(ids, np.full(len(ids), -1))


def at(ids: np.ndarray, where: np.ndarray, rows: np.ndarray, images: np.ndarray | Patches | None) -> Row:
    """A prompt with `rows` of the visual table at the positions that `where` marks, in order."""
    index = np.full(len(ids), -1)
    index[where] = rows
    return Row(np.where(where, 0, ids), index, images)


def spliced(ids: np.ndarray, runs: Sequence[np.ndarray], images: np.ndarray | None, *, placeholder: int) -> Row:
    """A prompt in which every placeholder becomes a run of rows of the visual table."""
    places = np.flatnonzero(ids == placeholder)
    assert len(places) == len(runs), f"{len(places)} placeholders for {len(runs)} runs of visual tokens"
    tokens, index = [], []
    for part, run in zip(np.split(ids, places), [np.zeros(0, int), *runs], strict=True):
        words = part[part != placeholder]
        tokens += [np.zeros(len(run), int), words]
        index += [run, np.full(len(words), -1)]
    return Row(np.concatenate(tokens), np.concatenate(index), images)


def spliced_labels(row: Row, labels: np.ndarray) -> np.ndarray:
    """Labels of the ids without placeholders, with visual tokens ignored: those of `row`."""
    out = np.full(len(row), IGNORED)
    out[row.visual_index < 0] = labels
    return out


def batch(rows: Sequence[Row], module: Any, *, left: bool = False) -> Batch:
    """Rows of one length for a model, padded on the right, or on the left as generation wants it."""
    length = max(map(len, rows))

    def padded(array: np.ndarray, value: int) -> np.ndarray:
        missing = length - len(array)
        return np.pad(array, (missing, 0) if left else (0, missing), constant_values=value)

    return Batch(
        tokens=np.stack([padded(row.tokens, 0) for row in rows]).astype(np.int32),
        positions=np.stack([padded(np.arange(len(row)), 0) for row in rows]).astype(np.int32),
        segment_ids=np.stack([padded(np.ones(len(row), int), 0) for row in rows]).astype(np.int32),
        visual_index=np.stack([padded(row.visual_index, -1) for row in rows]).astype(np.int32),
        images=_images([row.images for row in rows], module),
    )


def _images(given: Sequence[np.ndarray | Patches | None], module: Any) -> np.ndarray | PackedPatches | None:
    """Of all rows: as many as the row with most has, completed with zeros."""
    kinds = [images for images in given if images is not None]
    if not kinds:
        return None
    if isinstance(kinds[0], Patches):
        pack = functools.partial(
            patches.pack_patches,
            merge_size=module.encoder.merge_size,
            window=module.encoder.window,
            class_tokens=module.encoder.class_tokens,
        )
        none = Patches(kinds[0].patches[:0], kinds[0].grids[:0])
        packed = [pack(*(none if images is None else images)) for images in given]
        length = max(one.patches.shape[1] for one in packed)
        packed = [pack(*(none if images is None else images), length=length) for images in given]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *packed)
    pixels = np.zeros((len(given), max(map(len, kinds)), *kinds[0].shape[1:]), np.float32)
    for row, images in zip(pixels, given, strict=True):
        if images is not None:
            row[: len(images)] = images
    return pixels


def logits(ours: Any, rows: Mapping[str, Row], *, left: bool = False) -> dict[str, np.ndarray]:
    """The logits [T, V] of every row, by its name; `left` pads on the left."""
    found = np.asarray(ours.logits(batch(list(rows.values()), ours.module, left=left)))
    return _unpadded(rows, found, left)


def of_case(rows: Mapping[str, Any], case: str) -> list[Any]:
    """What stands under `case.0`, `case.1` and so on, in order."""
    return [rows[f"{case}.{i}"] for i in range(sum(name.rpartition(".")[0] == case for name in rows))]


def shown_rows(golden: Golden, name: str, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The positions of each row that the manifest's array holds; the last one alone where it has no axis for them."""
    stacked = np.stack([shown(golden.entries[name], array) for array in arrays])
    return stacked[:, 0] if golden.expected[name].ndim == 2 else stacked


def greedy_cases(
    golden: Golden, ours: Any, rows: Mapping[str, Row], ending: str, choose: Choose | None = None
) -> dict[str, np.ndarray]:
    """The manifest's arrays named after a case and the ending: ids of its first row, or of all where they have an axis.

    Args:
      golden: the folder.
      ours: the loaded model.
      rows: of every case, as `case.0`, `case.1` and so on.
      ending: of the names, as `_greedy`.
      choose: `greedy` when None, or `greedy_anew`.
    """
    cases = {name: name.removesuffix(ending) for name in golden.expected if name.endswith(ending)}
    wanted: dict[str, Row] = {}
    for name, case in cases.items():
        count = 1 if golden.expected[name].ndim == 1 else len(golden.expected[name])
        wanted |= {f"{case}.{i}": rows[f"{case}.{i}"] for i in range(count)}
    if not wanted:
        return {}
    ids = (choose or greedy)(ours, wanted, max(golden.expected[name].shape[-1] for name in cases))
    every = {name: np.stack(of_case(ids, case))[:, : golden.expected[name].shape[-1]] for name, case in cases.items()}
    return {name: array[0] if golden.expected[name].ndim == 1 else array for name, array in every.items()}


class States(NamedTuple):
    """What a row passes through: embeddings [T, D], the input of every block and the normalised output, and logits."""

    embeddings: np.ndarray
    hidden: np.ndarray
    logits: np.ndarray


Official = Mapping[str, np.ndarray]  # embeddings [T, D] of rows, by their names


def states(ours: Any, rows: Mapping[str, Row], official: Official | None = None) -> dict[str, States]:
    """The states of every row, visual tokens included, by its name; one program.

    Hidden states and logits follow from the `official` embeddings of a row where they are given: visual rows
    of random models are small, and the first norm makes a rounding of theirs some hundred times as large.
    """
    apply = jax.jit(lambda params, *args: ours.module.apply({"params": params}, *args, method=forward))
    found = jax.tree.map(np.asarray, apply(ours.params, *forward_inputs(ours, rows, official or {})))
    return {
        name: States(embedded[: len(row)], hidden[:, : len(row)], logits[: len(row)])
        for (name, row), embedded, hidden, logits in zip(rows.items(), *found, strict=True)
    }


def forward(model: Any, batch: Batch, official: jax.Array, known: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Embeddings, hidden states [B, L + 1, T, D] and logits of a batch, as a method of the model.

    Rows that are `known` continue with `official` values, while gradients pass as if they had not.
    """
    seen = []

    def collect(call, args, kwargs, context):
        if context.method_name != "__call__" or context.module.path != ("decoder", "blocks"):
            return call(*args, **kwargs)
        seen.append(call(*args, **{**kwargs, "collect": True}))
        return seen[-1]

    embeddings, segments, *_ = model.embed(batch)
    follows = embeddings + jax.lax.stop_gradient(jnp.where(known, official - embeddings, 0))
    with nn.intercept_methods(collect):
        hidden, _ = model.decoder(follows, batch.positions, segments)
    every = jnp.concatenate([seen[0][2][:-1], hidden[None]])
    return embeddings, every.swapaxes(0, 1), model.decoder.logits(hidden)


def forward_inputs(ours: Any, rows: Mapping[str, Row], official: Official) -> tuple[Batch, np.ndarray, np.ndarray]:
    """The arguments of `forward`."""
    inputs = jax.tree.map(jnp.asarray, batch(list(rows.values()), ours.module))
    given = np.zeros((*inputs.tokens.shape, ours.module.decoder.width), np.float32)
    for i, name in enumerate(rows):
        if name in official:
            given[i, : len(rows[name])] = official[name]
    return inputs, given, np.array([name in official for name in rows])[:, None, None]


def _unpadded(rows: Mapping[str, Row], found: np.ndarray, left: bool) -> dict[str, np.ndarray]:
    return {
        name: array[len(array) - len(row) :] if left else array[: len(row)]
        for (name, row), array in zip(rows.items(), found, strict=True)
    }


def shown(entry: Mapping[str, Any], array: np.ndarray) -> np.ndarray:
    """The positions that the manifest says an array holds: one in so many and the last ones, or the last ones alone."""
    if sparse := re.search(r"positions 0,(\d+),.* then the last (\d+)", entry["meaning"]):
        return np.concatenate([array[:: int(sparse.group(1))], array[-int(sparse.group(2)) :]])
    count = entry["shape"][1] if len(entry["shape"]) == 3 else 1
    return array[-count:]


@jax.jit
def _cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    return cross_entropy(logits, jnp.maximum(target, 0), jnp.asarray(target != IGNORED, jnp.float32))[0]


def loss(logits: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> jax.Array:
    """Mean cross entropy of what the labels of the position after say, over all rows."""
    join = np if isinstance(logits[0], np.ndarray) else jnp
    return _cross_entropy(join.concatenate([row[:-1] for row in logits]), np.concatenate([row[1:] for row in labels]))


def greedy(ours: Any, rows: Mapping[str, Row], count: int) -> dict[str, np.ndarray]:
    """The `count` most likely next ids of every row, one after another, by its name."""
    prompts = batch(list(rows.values()), ours.module, left=True)
    found = generate(ours.module, ours.params, prompts, max_new_tokens=count, chunk=count)
    return dict(zip(rows, found.tokens, strict=True))


def greedy_anew(ours: Any, rows: Mapping[str, Row], count: int) -> dict[str, np.ndarray]:
    """The same where every id follows from the whole row, read again, instead of a cache."""
    ends = np.array([len(row) for row in rows.values()])
    longest = [
        at(np.pad(row.tokens, (0, count)), np.zeros(len(row) + count, bool), [], row.images) for row in rows.values()
    ]
    inputs = batch(longest, ours.module)
    for row, given in zip(inputs.visual_index, rows.values(), strict=True):
        row[: len(given)] = given.visual_index
    tokens, place = inputs.tokens.copy(), np.arange(inputs.tokens.shape[1])
    for step in range(count):
        read = (place < ends[:, None] + step).astype(np.int32)
        logits = np.asarray(ours.logits(dataclasses.replace(inputs, tokens=tokens.copy(), segment_ids=read)))
        every = np.arange(len(ends))
        tokens[every, ends + step] = logits[every, ends + step - 1].argmax(-1)
    return {name: row[end : end + count] for name, row, end in zip(rows, tokens, ends, strict=True)}
