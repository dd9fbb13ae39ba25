"""The settings classes of `config.processor`, `config.row` and `config.evaluation`."""

import dataclasses
from typing import Annotated, Literal

from vlm_jax.config import ConfigError, check_fields, check_keys
from vlm_jax.paths import absolute
from vlm_jax.processors.digits_vocabulary import digits_tokenizer
from vlm_jax.processors.documents_vocabulary import documents_tokenizer
from vlm_jax.processors.image import FILTERS
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.ranges import Count, Finite, Positive, Range, Side, Size
from vlm_jax.types import ROW_KEYS, RowShape

Tiles = Annotated[int, Range(1, 100)]  # in a row or a column
SPECIAL_TOKENS = ("pad", "bos", "eos", "image")
TOKENIZERS = {"digits": digits_tokenizer, "documents": documents_tokenizer}  # built in, by the kind of the data


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelSettings:
    """`config.processor` of a classifier: preprocessing of images.

    Attributes:
      image_size: (height, width) in pixels at full budget, of a tile where there are several; None where
        the encoder packs images of any size.
      mean: per channel in [0, 1], subtracted from the pixels.
      std: per channel in [0, 1], divides them.
      filter: resampling filter, a key of `processors.image.FILTERS`.
    """

    image_size: tuple[Side, Side] | None
    mean: tuple[Finite, ...]
    std: tuple[Positive, ...]
    filter: str

    def __post_init__(self):
        check_fields(self, "config.processor.")

    def pixels(self, channels: int) -> Pixels:
        """Resizing and normalisation.

        Args:
          channels: channels of the data's images.

        Raises:
          ConfigError: statistics of another number of channels, or an unknown filter.
        """
        if channels not in (1, 3):
            raise ConfigError(f"config.data.channels: expected 1 or 3, got {channels}")
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                raise ConfigError(f"config.processor.{key}: expected {channels} numbers, one per channel, got {values}")
        if self.filter not in FILTERS:
            raise ConfigError(f"config.processor.filter: expected one of {', '.join(FILTERS)}, got '{self.filter}'")
        return Pixels(self.mean, self.std, FILTERS[self.filter])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTextSettings(PixelSettings):
    """`config.processor` of two towers: preprocessing of images and captions.

    Attributes:
      tokenizer: `digits` or `documents` for the built-in vocabulary of these pages, else a tokenizer.json.
      special_tokens: names of the tokenizer's `pad`, `bos`, `eos` and `image`, where they are not `<pad>` and
        so on.
    """

    tokenizer: str
    special_tokens: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        check_keys(self.special_tokens, SPECIAL_TOKENS, "config.processor.special_tokens")
        if self.special_tokens and self.tokenizer in TOKENIZERS:
            raise ConfigError("config.processor.special_tokens: the built-in tokenizer has its own; remove them")

    def read_tokenizer(self) -> Tokenizer:
        """The built-in tokenizer, or that of the file.

        Raises:
          ConfigError: the file cannot be read.
          TokenizerError: as `Tokenizer.from_file`.
        """
        if self.tokenizer in TOKENIZERS:
            return TOKENIZERS[self.tokenizer]()
        names = {f"{role}_token": self.special_tokens.get(role, f"<{role}>") for role in SPECIAL_TOKENS}
        try:
            return Tokenizer.from_file(absolute(self.tokenizer), names)
        except OSError as error:
            raise ConfigError(
                f"config.processor.tokenizer: {error}; expected {', '.join(TOKENIZERS)}, or a tokenizer.json"
            ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessorSettings(ImageTextSettings):
    """`config.processor`: preprocessing of images and text.

    Attributes:
      independent_turns: whether turns of a training row do not attend to each other.
      tiles: rows and columns of tiles into which an image is divided, each an image for the encoder.
      thumbnail: whether the whole image, at the size of a tile, follows its tiles.
      frames: number of evenly spaced frames of a sample's images, which are a clip; else None.
      min_tokens: where the encoder packs images of any size, the minimum visual tokens of an image; a
        smaller one is enlarged.
    """

    independent_turns: bool
    tiles: tuple[Tiles, Tiles] = (1, 1)
    thumbnail: bool = False
    frames: Count | None = None
    min_tokens: Count = 1

    def __post_init__(self):
        super().__post_init__()
        if self.thumbnail and self.tiles == (1, 1):
            raise ConfigError("config.processor.thumbnail: needs several tiles; set it to False")


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """`config.row`: the static shape of training rows, and what is learned of them.

    Attributes:
      text_length: positions of text; those of the budget's visual tokens are added. Exactly one of this and
        `length` is set.
      length: all positions.
      images: tiles, or places of packed patches, that a row holds, of a release or with `pack`; else None, since
        samples of a config have as many pictures each.
      pictures: the most pictures of a row; needed where a reducer acts on every picture of a packed row.
      kept: positions of a row that are left after each drop of visual tokens inside the decoder, which a row of a
        release, or with `pack`, may need; all when None.
      pack: whether several samples share a row, told apart by segment ids.
      buckets: lengths that rows are padded to, each a program of its own; a batch takes the smallest that holds it.
      turns: which answers of a conversation are learned, "all" or "last"; a message's own `loss` and `weight` take
        precedence.
      as_released: labels with the faults of the release's fine-tuning code; see `processors.as_released`.
    """

    text_length: Size | None = None
    length: Size | None = None
    images: Size | None = None
    pictures: Size | None = None
    kept: tuple[Size, ...] | None = None
    pack: bool = False
    buckets: Annotated[int, Range(1, 64)] = 1
    turns: Literal["all", "last"] = "all"
    as_released: bool = False

    def __post_init__(self):
        check_fields(self, "config.row.")
        if (self.text_length is None) == (self.length is None):
            raise ConfigError(
                "config.row: expected either text_length (positions of text, visual tokens not counted) or length (all "
                f"positions), got text_length={self.text_length} and length={self.length}"
            )

    @property
    def keys(self) -> dict[str, str]:
        """The config key that sets each capacity of a row, by the capacity's name, for the keys that are set."""
        changed = {}
        if self.text_length is not None:
            changed["positions"] = "config.row.text_length"
        if self.images is None:
            changed["tiles or patches"] = "config.data.num_images"
        return {**ROW_KEYS, **changed}

    def shape(self, num_drops: int) -> RowShape:
        """Rows that hold samples of any number of pictures.

        Args:
          num_drops: of visual tokens inside the decoder.

        Raises:
          ConfigError: length or images is missing, or `kept` does not fit the drops.
        """
        if self.length is None or self.images is None:
            raise ConfigError(
                "config.row: rows of a release, or with pack, need length (positions) and images (tiles, or places of "
                "patches); set both, and text_length to None"
            )
        kept = (self.length,) * num_drops if self.kept is None else self.kept
        if len(kept) != num_drops or any(not 1 <= count <= self.length for count in kept):
            raise ConfigError(
                f"config.row.kept: expected a number of positions up to {self.length} for each of {num_drops} drops "
                f"of visual tokens, got {kept}"
            )
        return RowShape(self.length, self.images, kept, self.pictures)

    @property
    def are_single(self) -> bool:
        """Whether every row has one sample and one length."""
        return not self.pack and self.buckets == 1

    def positions(self, visual: int) -> int:
        """Length of a row with `visual` visual tokens."""
        return self.length if self.text_length is None else self.text_length + visual  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """`config.evaluation`.

    Attributes:
      batch_size: prompts per batch.
      question_length: text positions of a prompt, without visual tokens; None for a release, whose prompts are
        padded to the longest of their batch.
      max_new_tokens: maximum tokens of an answer, including its end token.
      every: steps between evaluations during training; None for one at its end alone.
      metrics: metrics as `task=name`, for tasks with another one than `evals.metrics.BY_TASK` says.
    """

    batch_size: Size
    question_length: Size | None
    max_new_tokens: Size
    every: Count | None = None
    metrics: tuple[str, ...] = ()

    def __post_init__(self):
        check_fields(self, "config.evaluation.")
