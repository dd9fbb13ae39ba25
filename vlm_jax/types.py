"""What flows between the rooms, and the letters that shapes are written in.

Letters of shape annotations, everywhere in the package:

| letter | meaning |
|---|---|
| B | examples in a batch |
| I | images of one example (tiles and frames count as images) |
| T, S | positions of a sequence: queries, keys |
| N | visual features of one image, as an encoder returns them |
| M | visual tokens of one image, as a connector returns them |
| R, C | rows and columns of a patch grid |
| D | width |
| V | vocabulary size |
| L | layers |
| Q, K, H | query heads, key and value heads, head dimension |
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, dataclass_transform

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

if TYPE_CHECKING:
    Array = Any
else:  # host arrays, device arrays, and the shapes that stand for them before anything runs
    Array = jax.Array | np.ndarray | jax.ShapeDtypeStruct

Class = TypeVar("Class")


def static_field(**settings: Any) -> Any:
    """A field of a `struct` that is part of the tree's structure, not a leaf."""
    return dataclasses.field(metadata={"static": True}, **settings)


@dataclass_transform(frozen_default=True, field_specifiers=(static_field, dataclasses.field))
def struct(cls: type[Class]) -> type[Class]:
    """A frozen dataclass that is a pytree of its fields.

    Unlike `flax.struct.dataclass`, a tree operation rebuilds it without `__init__`, so that the
    annotated shapes are checked where a batch is made and not where a transformation maps its
    leaves to shardings, shapes or None.
    """
    made = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(made)  # type: ignore[arg-type]
    static = tuple(field.name for field in fields if field.metadata.get("static"))
    leaves = tuple(field.name for field in fields if field.name not in static)

    def flatten(value: Any) -> tuple[tuple, tuple]:
        return tuple(getattr(value, name) for name in leaves), tuple(getattr(value, name) for name in static)

    def flatten_with_keys(value: Any) -> tuple[tuple, tuple]:
        children, structure = flatten(value)
        return tuple(
            (jax.tree_util.GetAttrKey(name), child) for name, child in zip(leaves, children, strict=True)
        ), structure

    def unflatten(structure: Any, children: Any) -> Any:
        value = object.__new__(made)
        for name, child in zip(leaves + static, (*children, *structure), strict=True):
            object.__setattr__(value, name, child)
        return value

    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
    return made


# (rows, columns) of patches or tokens.
Grid = tuple[int, int]

PADDING_SEGMENT = 0  # segment ids count from 1; 0 is padding
PROMPT_SEGMENT = 1  # of a prompt that is to be gone on with, and of its answer
TEXT_SLOT = -1  # visual_index of a position that holds text


@struct
class VisualFeatures:
    """What an encoder returns for a flat batch of images.

    Attributes:
      tokens: features in row-major order of `grid`, width D_v; or block after block, see `block`.
      mask: True where a feature is real.
      grid: (rows, columns), static; rows * columns == N. Features that no longer form a rectangle
        (after dropping) have the grid (1, N), those of packed images (block, N // block).
      pooled: the encoder's own image embedding where it has a head for one, else None.
      hidden: [L + 1, B, P, W] inputs of every block and the last output, only when asked for; P and
        the residual width W are those of the blocks.
      levels: several hidden states side by side, each feature's in its place, where the encoder is asked for
        them, else None.
      block: static; 1 where features are in row-major order. Above, each block x block neighbours of an
        image follow one another, row by row, and block follows block: the order of packed patches.
      saliency: attention that each feature gets in the last block, float32, only when asked for: from
        the class token, or the mean over all tokens where there is none.
      keys: of each feature and head in that block, with `saliency`.
      first_dim: static; channels that the first of two encoders gave, where channels of both stand in
        `tokens`, else None.
      num_prefix: static; features in front that are no patches: 1 where the class token is kept among them, else 0.
      kept: behind a reducer, the index of each feature among those that the reducer was given (of a merged
        one, the index whose place it takes), else None.
    """

    tokens: Float[Array, "B N D"]
    mask: Bool[Array, "B N"]
    grid: Grid = static_field()
    pooled: Float[Array, "B E"] | None = None
    hidden: Float[Array, "L B P W"] | None = None
    block: int = static_field(default=1)
    levels: Float[Array, "B N F"] | None = None
    saliency: Float[Array, "B N"] | None = None
    keys: Float[Array, "B N K H"] | None = None
    first_dim: int | None = static_field(default=None)
    kept: Int[Array, "B N"] | None = None
    num_prefix: int = static_field(default=0)

    def reduced(
        self, tokens: Float[Array, "B K D"], mask: Bool[Array, "B K"], grid: Grid, kept: Int[Array, "B K"] | None = None
    ) -> "VisualFeatures":
        """Fewer features of the same channels in their stead, without what was found of each one."""
        return VisualFeatures(tokens, mask, grid, first_dim=self.first_dim, kept=kept)


@struct
class VisualTokens:
    """What a connector returns: M tokens of the decoder's width for every image.

    Attributes:
      tokens: in the order in which they fill the visual table.
      mask: True where a token is real.
      kept: where a reducer chose, the index of each token among all tokens (or features) of its image or packed
        row before the reducer; else None.
    """

    tokens: Float[Array, "B M D"]
    mask: Bool[Array, "B M"]
    kept: Int[Array, "B M"] | None = None


@dataclasses.dataclass(frozen=True)
class PatchFormat:
    """How an encoder of packed patches wants images cut and packed.

    Attributes:
      patch_size: side of a patch in pixels.
      temporal_patch_size: frames of a patch.
      merge_size: side in patches of the blocks that stay together.
      window: side of an attention window in blocks; None where no layer has windows.
      channels_last: a patch is flattened as (frame, row, column, channel).
    """

    patch_size: int
    temporal_patch_size: int = 1
    merge_size: int = 1
    window: int | None = None
    channels_last: bool = False

    @property
    def block_size(self) -> int:
        """Side of a block in pixels."""
        return self.patch_size * self.merge_size

    def num_slots(self, num_frames: int) -> int:
        """Temporal patches that so many frames are cut into."""
        return -(-num_frames // self.temporal_patch_size)


@struct
class Instruction:
    """Text that a connector reads beside the features of an image.

    Attributes:
      tokens: ids of the connector's own vocabulary.
      mask: True where a token is real.
    """

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]


@struct
class PackedImages:
    """Where the images of a packed row lie among its merged tokens; for reducers, which act image by image.

    Attributes:
      starts: index of each image's first token in the row, in the processor's order.
      counts: tokens of each image; 0 where there is none.
      longest: static; the most tokens that one image can have.
    """

    starts: Int[Array, "B I"]
    counts: Int[Array, "B I"]
    longest: int = static_field(default=0)


@struct
class PackedPatches:
    """Patches of several images and video frames of any size in one sequence, laid out on the host.

    The processor's order of patches is that of the released systems: image after image, frame after
    frame, blocks of merge_size x merge_size neighbours row by row, and a block's patches row by row.
    Windows may ask for another order inside the sequence; features come back in the processor's.

    Attributes:
      patches: normalised pixels of every patch, flattened as (channel, frame, row, column), or as the
        encoder's `PatchFormat` says.
      positions: (row, column) of a patch in its image, in patches.
      sizes: (rows, columns) of the image that a patch is of, in patches.
      segment_ids: counts images and frames from 1; 0 is padding. Full attention stays inside.
      window_ids: counts windows from 1; 0 is padding. None where patches lie in the processor's order.
      order: place in the sequence of every patch in the processor's order, padding last; None
        where window_ids is None.
      window_length: patches of a row of whole windows, the largest that one window can have; 0
        without windows.
      images: which tokens are of which image, where a reducer needs it, else None.
    """

    patches: Float[Array, "B N P"]
    positions: Int[Array, "B N 2"]
    sizes: Int[Array, "B N 2"]
    segment_ids: Int[Array, "B N"]
    window_ids: Int[Array, "B N"] | None = None
    order: Int[Array, "B N"] | None = None
    window_length: int = static_field(default=0)
    images: PackedImages | None = None


@struct
class TwoSizes:
    """Images at two sizes, for an encoder that is told what its second tower sees.

    Attributes:
      high: pixels.
      low: the same images, smaller.
    """

    high: Float[Array, "*images height width channels"]
    low: Float[Array, "*images low_height low_width channels"]


@struct
class VisualPlaces:
    """Where a sequence's visual tokens stand, whose attention ranks them, and how long rows are after each drop.

    Attributes:
      index: position of every token of every image (or tile), in order; T for a token that is in no place.
      ranking: True at the last position of each instruction, which no drop touches.
      lengths: static; positions of a row after each of the decoder's drops, enough for every real position
        that is left. Empty where they follow from the index: T less what each image loses, whether or not a
        row has as much to lose.
    """

    index: Int[Array, "B I M"]
    ranking: Bool[Array, "B T"]
    lengths: tuple[int, ...] = static_field(default=())


# Rotary positions: one of each place, or three (temporal, row, column) as M-RoPE has them.
Positions = Int[Array, "B T"] | Int[Array, "B T 3"]


@struct
class Batch:
    """One batch of sequences, laid out on the host.

    Attributes:
      tokens: vocabulary ids; any id where a visual token goes.
      positions: RoPE positions, counted from 0 in every segment; on three axes for M-RoPE.
      segment_ids: 0 is padding; a position attends only inside its segment.
      visual_index: which row of the example's visual table fills the position, or -1 for text.
        Rows are the image tokens in order: of images of one size, image i's token m is row i * M + m;
        of packed patches, the tokens of one image follow those of the image before. Of a model with
        learned rows (`VLM.learned_rows`), those are the first ones, and the image tokens follow.
      images: float32 pixels, normalised by the processor, or all images of an example packed into
        one sequence, or images at two sizes, or None for text alone.
      targets: the id to be predicted at each position (already shifted), any id without weight.
      loss_weights: 1.0 where the prediction counts.
      branch_ids: None, or what a position reads of its segment: branch 0 and its own branch.
      places: of decoders that drop visual tokens between layers, else None.
      visual_positions: where a reducer chooses tokens and each keeps its own position: that of every token
        before the reducer, as its `kept` counts them (of tiles, tile after tile); else None, and positions are
        as laid out.
      instruction: what a Q-Former reads beside the images, a row for each image of the batch, else None.
    """

    tokens: Int[Array, "B T"]
    positions: Positions
    segment_ids: Int[Array, "B T"]
    visual_index: Int[Array, "B T"]
    images: Float[Array, "B I height width channels"] | PackedPatches | TwoSizes | None = None
    targets: Int[Array, "B T"] | None = None
    loss_weights: Float[Array, "B T"] | None = None
    branch_ids: Int[Array, "B T"] | None = None
    places: VisualPlaces | None = None
    visual_positions: Int[Array, "B R"] | Int[Array, "B R 3"] | None = None
    instruction: Instruction | None = None


@struct
class ImageTextBatch:
    """Pictures and texts side by side, as two towers read them; a classifier reads pictures alone.

    Attributes:
      images: float32 pixels, normalised, or patches with one image a sequence; None without pictures.
      tokens: vocabulary ids, texts filled up to one length; None without texts.
    """

    images: Float[Array, "B height width channels"] | PackedPatches | None = None
    tokens: Int[Array, "B2 T"] | None = None

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What is there of the two, as the module takes it."""
        return tuple(part for part in (self.images, self.tokens) if part is not None)


class Drop(NamedTuple):
    """One place of a decoder where visual tokens are dropped.

    Attributes:
      layer: before which, counted from 0.
      num_kept: visual tokens of each image that are left; all of an image that has fewer.
      ranked_by: the layer whose attention ranks them: the one before, or `layer` itself.
      share: where it is given, the share of an image's first tokens that is left instead of `num_kept`.
      rounding: how that becomes a number: rounded down, or to the nearest integer (halves to the even one).
      renumbers: positions count from 0 behind it, without those of the tokens that are gone.
    """

    layer: int
    num_kept: int
    ranked_by: int
    share: float | None = None
    rounding: Literal["down", "nearest"] = "down"
    renumbers: bool = False

    def num_left(self, count: int) -> int:
        """Tokens that are left behind it of an image that enters the decoder with `count`."""
        if self.share is None:
            return min(self.num_kept, count)
        return int(count * self.share) if self.rounding == "down" else round(count * self.share)


@struct
class CellBatch:
    """Pages with a dense target: the class of every cell of a page, and where it lies.

    Attributes:
      images: float32 pixels.
      classes: class of the cell at (row, column).
      boxes: (left, top, right, bottom) of the cell's content, as fractions of the page.
    """

    images: Float[Array, "B 1 height width channels"]
    classes: Int[Array, "B R C"]
    boxes: Float[Array, "B R C 4"]


@dataclasses.dataclass(frozen=True)
class Load:
    """What one example, or one row of several, takes of a `RowShape`; loads of a row add up.

    Attributes:
      length: positions.
      images: tiles, or places of packed patches.
      kept: positions that are left after each drop of visual tokens inside the decoder.
      pictures: pictures, and places of videos.
    """

    length: int
    images: int
    kept: tuple[int, ...] = ()
    pictures: int = 0

    def __add__(self, other: "Load") -> "Load":
        kept = tuple(mine + theirs for mine, theirs in zip(self.kept, other.kept, strict=True))
        return Load(self.length + other.length, self.images + other.images, kept, self.pictures + other.pictures)


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The static shape of a row of a batch.

    Attributes:
      length: positions.
      images: tiles, or places of packed patches.
      kept: positions of the row after each drop of visual tokens inside the decoder.
      pictures: the most pictures, where a reducer acts on each picture of a packed row; None for any number.
    """

    length: int
    images: int
    kept: tuple[int, ...] = ()
    pictures: int | None = None

    def holds(self, load: Load) -> bool:
        """Whether a load fits in an empty row."""
        return not self.excess(load)

    def excess(self, load: Load) -> list[tuple[str, int, int]]:
        """What a load needs more of than an empty row has: (in words, needed, size of the row)."""
        amounts = [
            ("positions", load.length, self.length),
            ("tiles or places of patches", load.images, self.images),
            ("pictures", load.pictures, load.pictures if self.pictures is None else self.pictures),
        ]
        for drop, (need, size) in enumerate(zip(load.kept, self.kept, strict=True), start=1):
            amounts.append((f"positions after drop {drop}", need, size))
        return [amount for amount in amounts if amount[1] > amount[2]]


@dataclasses.dataclass(frozen=True)
class Turn:
    """One question about a sample's images, and its answer.

    Attributes:
      question: text before the model answers.
      answer: text that the model is to give.
      task: which metric scores the answer.
    """

    question: str
    answer: str
    task: str = "vqa"


# A chat message: {"role": "user", "content": "…"}, or with content such as
# [{"type": "image"}, {"type": "text", "text": "…"}].
Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a data source yields, before any tokenizer or image size is known.

    Attributes:
      sample_id: names the sample in every message about it.
      messages: the conversation, with an item `{"type": "image"}` for every picture; the last message is the answer.
      images: uint8 pictures of any size, [height, width, channels], in the order of their items.
      task: which metric scores the answer; free text for sets with a single task.
    """

    sample_id: str
    messages: tuple[Message, ...]
    images: tuple[np.ndarray, ...] = ()
    task: str = "vqa"

    @property
    def question(self) -> str:
        """The text before the last answer, without pictures."""
        return text_of(self.messages[-2])

    @property
    def answer(self) -> str:
        """The last answer."""
        return text_of(self.messages[-1])


@dataclasses.dataclass(frozen=True)
class SampleSizes:
    """A sample of which no pixel is decoded: what decides how much of a row it takes.

    Attributes:
      sample_id, messages: as of `Sample`.
      sizes: (height, width) of each picture, pixels.
    """

    sample_id: str
    messages: tuple[Message, ...]
    sizes: tuple[tuple[int, int], ...] = ()


def text_of(message: Message) -> str:
    """The text of a message's last text item, or its whole content where that is a text; empty without any."""
    content = message["content"]
    return content if isinstance(content, str) else ["", *(i["text"] for i in content if i["type"] == "text")][-1]


def images_of(message: Message) -> list[Message]:
    """The image items of a message."""
    content = message["content"]
    return [] if isinstance(content, str) else [item for item in content if item["type"] == "image"]


def dialogue(turns: Sequence[Turn], *, num_images: int = 0, context: str = "") -> tuple[Message, ...]:
    """Messages of questions and their answers.

    Args:
      turns: in order.
      num_images: pictures that stand before the first question.
      context: text that stands between them and the first question.
    """
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        items: list[Message] = []
        if not number:
            items += [{"type": "image"}] * num_images + [{"type": "text", "text": context}] * bool(context)
        messages.append({"role": "user", "content": [*items, {"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": turn.answer})
    return tuple(messages)
