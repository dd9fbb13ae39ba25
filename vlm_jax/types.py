"""Types passed between packages, and the letters of shape annotations.

Letters of shape annotations in the whole package:

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
else:  # host arrays, device arrays, and their abstract shapes
    Array = jax.Array | np.ndarray | jax.ShapeDtypeStruct

Class = TypeVar("Class")


def static_field(**settings: Any) -> Any:
    """A static field of a `struct`: part of the tree's structure, not a leaf."""
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

    def flatten(value: object) -> tuple[tuple, tuple]:
        return tuple(getattr(value, name) for name in leaves), tuple(getattr(value, name) for name in static)

    def flatten_with_keys(value: object) -> tuple[tuple, tuple]:
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


Params = dict[str, Any]  # {name: array, or the same of a submodule}: parameters, or what stands for them
Fields = dict[str, Any]  # {name: value}: fields of a module, keyword arguments, a section of settings
Config = Mapping[str, Any]  # the same, read only: released settings, or a section of a config
Dtype = Any  # whatever JAX takes for a dtype
Tree = Any  # any pytree
Selection = Any  # whatever NumPy takes as an index

# (rows, columns) of patches or tokens.
Grid = tuple[int, int]

PADDING_SEGMENT = 0  # segment ids count from 1; 0 is padding
PROMPT_SEGMENT = 1  # of a prompt for generation, and of its answer
TEXT_SLOT = -1  # visual_index of a text position
NO_ID = -1  # token id of a visual token


@struct
class Guidance:
    """An image's features and its question in one space, for reducers that choose by the question.

    Attributes:
      image: embedding of each feature, not normalised.
      text: embedding of each segment of the question, not normalised.
      mask: True where a segment is real.
    """

    image: Float[Array, "B N E"]
    text: Float[Array, "B S E"]
    mask: Bool[Array, "B S"]


@struct
class VisualFeatures:
    """The output of an encoder for a flat batch of images.

    Attributes:
      tokens: features in row-major order of `grid`, width D_v; or in blocks, see `block`.
      mask: True where a feature is real.
      grid: (rows, columns), static; rows * columns == N. Features that no longer form a rectangle
        (after dropping) have the grid (1, N), those of packed images (block, N // block).
      pooled: the encoder's image embedding if it has a head for one, else None.
      hidden: [L + 1, B, P, W] inputs of every block and the last output, only with `collect`; P and
        the residual width W are those of the blocks.
      levels: several concatenated hidden states of each feature, if the encoder's `levels` is set,
        else None.
      block: static; 1 where features are in row-major order. Above 1, features are ordered in blocks of
        block x block neighbours, in row-major order inside a block: the order of packed patches.
      saliency: attention that each feature gets in the last block, float32, only on request: from
        the class token, or averaged over all tokens where there is none.
      keys: attention keys of each feature and head in that block, with `saliency`.
      first_dim: static; number of channels of the first of two encoders, where `tokens` has the channels
        of both, else None.
      num_prefix: static; number of leading features that are not patches: 1 with a class token, else 0.
      frames: of packed videos, the number of frames into which the unmasked features of each divide evenly; None for
        images.
      guidance: the features and the image's question as a guide embeds them (`models.guide`), else None.
      kept: after a reducer, the index of each feature in the reducer's input (for a merged
        one, the index whose position it takes), else None.
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
    frames: Int[Array, "B"] | None = None
    guidance: Guidance | None = None

    def reduced(
        self, tokens: Float[Array, "B K D"], mask: Bool[Array, "B K"], grid: Grid, kept: Int[Array, "B K"] | None = None
    ) -> "VisualFeatures":
        """Replaces the features by fewer ones with the same channels, without per-feature statistics."""
        return VisualFeatures(tokens, mask, grid, first_dim=self.first_dim, kept=kept)


@struct
class VisualTokens:
    """The output of a connector: M tokens of the decoder's width for every image.

    Attributes:
      tokens: in the order of the visual table.
      mask: True where a token is real.
      kept: after a reducer, the index of each token among all tokens (or features) of its image or packed
        row before the reducer; else None.
      levels: what is added to the outputs of the decoder's first blocks at the positions of the tokens: D channels
        for each block, concatenated; None for nothing.
    """

    tokens: Float[Array, "B M D"]
    mask: Bool[Array, "B M"]
    kept: Int[Array, "B M"] | None = None
    levels: Float[Array, "B M F"] | None = None


@dataclasses.dataclass(frozen=True)
class PatchFormat:
    """Patch format of an encoder of packed patches.

    Attributes:
      patch_size: side of a patch in pixels.
      temporal_patch_size: frames of a patch.
      merge_size: side in patches of the blocks in which patches are ordered.
      window: side of an attention window in blocks; None where no layer has windows.
      channels_last: a patch is flattened as (frame, row, column, channel).
      class_tokens: each image, or temporal patch of a video, has a place for a class token.
    """

    patch_size: int
    temporal_patch_size: int = 1
    merge_size: int = 1
    window: int | None = None
    channels_last: bool = False
    class_tokens: bool = False

    @property
    def block_size(self) -> int:
        """Side of a block in pixels."""
        return self.patch_size * self.merge_size

    def num_slots(self, num_frames: int) -> int:
        """Number of temporal patches of `num_frames` frames."""
        return -(-num_frames // self.temporal_patch_size)


@struct
class Instruction:
    """Text input of a connector in addition to the features of an image.

    Attributes:
      tokens: ids of the connector's own vocabulary.
      mask: True where a token is real.
    """

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]


class VideoSize(NamedTuple):
    """Size of a video of which no frame is decoded.

    Attributes:
      num_frames: number of sampled frames.
      height, width: of a frame, in pixels.
      times: of every frame, in seconds from the start; empty where only their rate is known.
      duration: of the video that the frames are of, in seconds; None where only the frames are known.
    """

    num_frames: int
    height: int
    width: int
    times: tuple[float, ...] = ()
    duration: float | None = None


@struct
class Question:
    """The question of each image, for the text tower of a guide.

    Attributes:
      tokens: ids of its segments, each as long as the tower.
      mask: True where a segment is real.
    """

    tokens: Int[Array, "*images S T"]
    mask: Bool[Array, "*images S"]


@struct
class PackedImages:
    """Positions of the images of a packed row among its merged tokens; for reducers, which act image by image.

    Attributes:
      starts: index of each image's first token in the row, in the processor's order.
      counts: tokens of each image; 0 where there is none.
      longest: static; maximum tokens of one image.
      frames: frames of each, which have equally many tokens; None where all are images.
    """

    starts: Int[Array, "B I"]
    counts: Int[Array, "B I"]
    longest: int = static_field(default=0)
    frames: Int[Array, "B I"] | None = None


@struct
class PackedPatches:
    """Patches of several images and video frames of any size in one sequence, laid out on the host.

    The processor's order of patches is that of the released systems: by image, by
    frame, by blocks of merge_size x merge_size neighbours in row-major order, and row-major inside a block.
    With windows the order in the sequence may differ; features are returned in the processor's order. The places of
    class tokens, which an encoder adds, are after all patches.

    Attributes:
      patches: normalised pixels of every patch, flattened as (channel, frame, row, column), or according to
        the encoder's `PatchFormat`.
      positions: (row, column) of a patch in its image, in patches.
      sizes: (rows, columns) of a patch's image, in patches.
      segment_ids: number of the image or frame, from 1; 0 is padding. Full attention is inside a segment.
      window_ids: number of the window, from 1; 0 is padding. None where patches are in the processor's order.
      order: index in the sequence of every patch in the processor's order, padding last; None
        where window_ids is None.
      window_length: patches of a row of whole windows, the maximum size of a window; 0
        without windows.
      class_tokens: True at the places of class tokens, one per segment; None where there are none.
      images: positions of the images' tokens, where a reducer needs them, else None.
    """

    patches: Float[Array, "B N P"]
    positions: Int[Array, "B N 2"]
    sizes: Int[Array, "B N 2"]
    segment_ids: Int[Array, "B N"]
    window_ids: Int[Array, "B N"] | None = None
    order: Int[Array, "B N"] | None = None
    window_length: int = static_field(default=0)
    class_tokens: Bool[Array, "B N"] | None = None
    images: PackedImages | None = None


@struct
class TwoSizes:
    """Images at two sizes, for an encoder of two towers.

    Attributes:
      high: pixels.
      low: the same images, smaller.
    """

    high: Float[Array, "*images height width channels"]
    low: Float[Array, "*images low_height low_width channels"]


@struct
class WholesAndTiles:
    """Images as a whole and, at another size, their tiles: of a row first all wholes, then all tiles.

    Attributes:
      wholes: pixels of the images of each row, then blank ones.
      tiles: pixels of the tiles of the images, one image after another, then blank ones.
      order: rows of the visual table, in which an image's tiles follow its whole: for each the index of a token of the
        wholes, or of the tiles behind them; any index for rows without a token.
    """

    wholes: Float[Array, "B I height width channels"]
    tiles: Float[Array, "B K tile_height tile_width channels"]
    order: Int[Array, "B R"]


@struct
class VisualPlaces:
    """Positions of a sequence's visual tokens, the queries that rank them, and row lengths after each drop.

    Attributes:
      index: position of every token of every image (or tile), in order; T for a token without a position.
      ranking: True at the last position of each instruction, which is never dropped.
      lengths: static; length of a row after each of the decoder's drops, sufficient for every remaining real
        position. Empty where it is computed from the index: T minus the tokens that all images
        lose, even if a row has fewer.
    """

    index: Int[Array, "B I M"]
    ranking: Bool[Array, "B T"]
    lengths: tuple[int, ...] = static_field(default=())


@struct
class Interpolation:
    """Visual tokens that are weighted means of rows of the visual table, as those of a resized grid of tokens.

    Attributes:
      index: the rows; any row where the weight is 0.
      weights: of each row; they sum to 1 for a visual token.
    """

    index: Int[Array, "*batch T 4"]
    weights: Float[Array, "*batch T 4"]


# Rotary positions: one per token, or three (temporal, row, column) as in M-RoPE.
Positions = Int[Array, "B T"] | Int[Array, "B T 3"]


@struct
class Batch:
    """One batch of sequences, laid out on the host.

    Attributes:
      tokens: vocabulary ids; any id for a visual token.
      positions: RoPE positions, counted from 0 in every segment; on three axes for M-RoPE.
      segment_ids: 0 is padding; a position attends only inside its segment.
      visual_index: row of the example's visual table for the position, or -1 for text.
        Rows are the image tokens in order: for images of one size, image i's token m is row i * M + m;
        for packed patches, the tokens of the images are concatenated. In a model with
        learned rows (`VLM.learned_rows`), these come first, and the image tokens follow. With an
        `interpolation` it is the row nearest to the token, a different one for each token.
      images: float32 pixels, normalised by the processor, or all images of an example packed into
        one sequence, or images at two sizes, or images and their tiles, or None for only text.
      targets: the id to predict at each position (already shifted), any id without weight.
      loss_weights: 1.0 where the prediction counts.
      branch_ids: None, or a branch per position, which attends to branch 0 and its own branch in its segment.
      group_ids: None, or a group per position: consecutive positions of one id other than 0 attend to each other in
        both directions, as the tokens of an image do in some systems.
      places: for decoders that drop visual tokens between layers, else None.
      visual_positions: where a reducer keeps positions of tokens, the position of every token
        before the reducer, as indexed by `kept` (for tiles, tile after tile); else None, and `positions` are
        used.
      instruction: text input of a Q-Former, one row per image of the batch, else None.
      question: for a reducer that chooses by the question, that of every image of `images`, else None.
      interpolation: for systems that resize grids of tokens, the rows that each visual token is computed from; else
        None, and each is the row of its `visual_index`.
    """

    tokens: Int[Array, "B T"]
    positions: Positions
    segment_ids: Int[Array, "B T"]
    visual_index: Int[Array, "B T"]
    images: Float[Array, "B I height width channels"] | PackedPatches | TwoSizes | WholesAndTiles | None = None
    targets: Int[Array, "B T"] | None = None
    loss_weights: Float[Array, "B T"] | None = None
    branch_ids: Int[Array, "B T"] | None = None
    group_ids: Int[Array, "B T"] | None = None
    places: VisualPlaces | None = None
    visual_positions: Int[Array, "B R"] | Int[Array, "B R 3"] | None = None
    instruction: Instruction | None = None
    question: Question | None = None
    interpolation: Interpolation | None = None


@struct
class ImageTextBatch:
    """Images and texts for a two-tower model, or only images for a classifier.

    Attributes:
      images: float32 pixels, normalised, or patches with one image per sequence; None without images.
      tokens: vocabulary ids, texts padded to one length; None without texts.
      labels: class of each image, for training a classifier, else None.
    """

    images: Float[Array, "B height width channels"] | PackedPatches | None = None
    tokens: Int[Array, "B2 T"] | None = None
    labels: Int[Array, "B"] | None = None

    @property
    def inputs(self) -> tuple[Tree, ...]:
        """The arguments of the module: images and tokens, where they are not None."""
        return tuple(part for part in (self.images, self.tokens) if part is not None)


@struct
class DistilledBatch:
    """Captioned images for a two-tower model, and the same as its teacher takes them."""

    student: ImageTextBatch
    teacher: ImageTextBatch


class Numbers(NamedTuple):
    """Visual tokens of one image at a drop that the text rates.

    Attributes:
      present: before it.
      kept: the best.
      candidates: the best of the others, which are merged.
      merged: tokens that these become.
    """

    present: int
    kept: int
    candidates: int
    merged: int


class Rating(NamedTuple):
    """How the text behind an image rates its tokens, and what becomes of those that are dropped (SparseVLM).

    Attributes:
      counts: tokens to leave of each image at every drop up to this one.
      recycles: the best of the dropped tokens are merged into a few, which stay.
      as_released: counts are without merged tokens, which follow the kept ones, and of every image something is
        dropped; else counts include them, and they stay at the place of one of their members.
      num_heads: heads that rate, those whose raters attend most to the image; all when None.
      without_rotary: attention is divided by the scores that the rotary angles give to vectors of ones.
    """

    counts: tuple[int, ...]
    recycles: bool = False
    as_released: bool = False
    num_heads: int | None = None
    without_rotary: bool = False

    def numbers(self, count: int) -> Numbers:
        """Tokens at this drop of an image that enters the decoder with `count`."""
        found = Numbers(count, count, 0, 0)
        for most in self.counts:
            found = self._next(found.kept + found.merged, most)
        return found

    def _next(self, present: int, most: int) -> Numbers:
        if self.as_released:
            kept = min(most, present - 1)
            if present and self.recycles:
                candidates, merged = _recycled(present - kept)
                return Numbers(present, kept, candidates, merged)
            return Numbers(present, max(kept, 0), 0, 0)
        left = min(most, present)
        if left == present or not self.recycles:
            return Numbers(present, left, 0, 0)
        fitting = (n for n in range(left - 1, 0, -1) if n + _recycled(present - n)[1] <= left)
        kept = next(fitting, 1)
        return Numbers(present, kept, _recycled(present - kept)[0] if left > kept else 0, left - kept)


def _recycled(dropped: int) -> tuple[int, int]:
    """Of dropped tokens, the number that are merged and the number that they become, as SparseVLM released it."""
    candidates = int(dropped * 0.3) + 1
    return candidates, candidates // 10 + 1


class Drop(NamedTuple):
    """A drop of visual tokens between two layers of a decoder.

    Attributes:
      layer: the layer before which it is, counted from 0.
      num_kept: visual tokens to keep of each image; all of an image that has fewer.
      ranked_by: the layer whose attention ranks them: the previous one, or `layer` itself.
      share: if given, the share of an image's initial tokens to keep instead of `num_kept`.
      rounding: rounds the share's number down, or to the nearest integer (halves to even).
      renumbers: positions are renumbered from 0 after it, without the dropped tokens.
      pivots: if given, tokens are not ranked by attention: numbers of pivots among an image's tokens and in the text
        after it, chosen by the keys of `ranked_by`; those least like them are kept. See `decoders.duplicates`.
      rating: if given, tokens are ranked by the attention of some of the text after the image. See `decoders.raters`.
    """

    layer: int
    num_kept: int
    ranked_by: int
    share: float | None = None
    rounding: Literal["down", "nearest"] = "down"
    renumbers: bool = False
    pivots: tuple[int, int] | None = None
    rating: Rating | None = None

    def num_left(self, count: int) -> int:
        """Number of tokens after it of an image that enters the decoder with `count`."""
        if self.rating is not None:
            numbers = self.rating.numbers(count)
            return numbers.kept + numbers.merged
        if self.share is None:
            return min(self.num_kept, count)
        if self.pivots is not None:  # every pivot takes as many, besides the image's own
            of_all = sum(self.pivots)
            return min(self.pivots[0] + of_all * int(count * self.share / of_all), count)
        return int(count * self.share) if self.rounding == "down" else round(count * self.share)


@struct
class CellBatch:
    """Pages with a dense target: the class and the box of every cell.

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
    """Size of one example, or of one row of several, to fit in a `RowShape`; loads of a row are added.

    Attributes:
      length: positions.
      images: tiles, or places of packed patches.
      kept: positions that are left after each drop of visual tokens inside the decoder.
      pictures: pictures, or their places where these are packed apart, and places of videos.
    """

    length: int
    images: int
    kept: tuple[int, ...] = ()
    pictures: int = 0

    def __add__(self, other: "Load") -> "Load":
        kept = tuple(mine + theirs for mine, theirs in zip(self.kept, other.kept, strict=True))
        return Load(self.length + other.length, self.images + other.images, kept, self.pictures + other.pictures)


# What a row can have too little of -> the config key that sets how much it has, where it is none of `kept`.
ROW_KEYS = {
    "positions": "config.row.length",
    "tiles or patches": "config.row.images",
    "pictures": "config.row.pictures",
}


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The static shape of a row of a batch.

    Attributes:
      length: positions.
      images: tiles, or positions of packed patches.
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
            ("tiles or patches", load.images, self.images),
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
      answer: target text.
      task: determines the metric of the answer.
    """

    question: str
    answer: str
    task: str = "vqa"


# A chat message: {"role": "user", "content": "…"}, or with content such as
# [{"type": "image"}, {"type": "text", "text": "…"}].
Message = Config


@dataclasses.dataclass(frozen=True)
class Sample:
    """An element of a data source, independent of tokenizers and image sizes.

    Attributes:
      sample_id: name of the sample in errors.
      messages: the conversation, with an item `{"type": "image"}` for every image; the last message is the answer.
      images: uint8 images of any size, [height, width, channels], in the order of their items.
      task: determines the metric of the answer; any text for data sets with a single task.
      videos: a path or the bytes of each video file, in the order of their items.
      rejected: the conversation to which `messages` is preferred, with the same images; empty without one.
      references: all right answers to the last question, where there are several to compare with; else empty.
      whole: the sample of the whole conversation, of which this is the part up to an answer; None of other samples.
    """

    sample_id: str
    messages: tuple[Message, ...]
    images: tuple[np.ndarray, ...] = ()
    task: str = "vqa"
    videos: tuple[str | bytes, ...] = ()
    rejected: tuple[Message, ...] = ()
    references: tuple[str, ...] = ()
    whole: "Sample | None" = None

    @property
    def question(self) -> str:
        """The text before the last answer, without images."""
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
      videos: size of each video.
    """

    sample_id: str
    messages: tuple[Message, ...]
    sizes: tuple[tuple[int, int], ...] = ()
    videos: tuple[VideoSize, ...] = ()


def text_of(message: Message) -> str:
    """The text of a message's last text item, or its content if that is a string; empty without text."""
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
      num_images: images before the first question.
      context: text between them and the first question.
    """
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        items: list[Message] = []
        if not number:
            items += [{"type": "image"}] * num_images + [{"type": "text", "text": context}] * bool(context)
        messages.append({"role": "user", "content": [*items, {"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": turn.answer})
    return tuple(messages)
