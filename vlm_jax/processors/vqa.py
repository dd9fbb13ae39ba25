"""From a sample (pictures, questions, answers) to one row of a batch.

The layout of a training row, with M visual tokens an image:

    <bos> [image 0: M] [image 1: M] ... [context] question answer <eos> question answer <eos> ...

of which the answers and their <eos> are learned. A prompt is the same row up to its first answer,
padded on the left.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8

from vlm_jax.config import ConfigError
from vlm_jax.processors.image import FILTERS, normalize, resize, to_channels
from vlm_jax.processors.layout import SequenceTooLong, Text, Visual, lay_out
from vlm_jax.processors.tokenizer import Tokenizer, UnknownText
from vlm_jax.types import Batch, Sample


@dataclasses.dataclass(frozen=True)
class VqaProcessor:
    """Turns samples into rows of one length.

    Attributes:
      tokenizer: spells questions, answers and context.
      image_size: (height, width) in pixels that every picture is resized to.
      channels: 1 (grey) or 3 (RGB).
      mean: per channel, on the scale [0, 1], taken off the rescaled pixels.
      std: per channel, divides what remains.
      filter: resampling filter, a key of `image.FILTERS`.
      num_visual_tokens: M, what the connector gives for one image.
      num_images: I, pictures that every sample has; 0 for text alone.
      independent_turns: lets no turn of a training row read another, and has each follow the images
        in its positions, as if it were alone: one encoded image serves many questions. Source: Deitke
        et al. 2024 (Molmo), section 3, multi-annotated images.
      max_length: positions of a training row.
      max_prompt_length: positions of a prompt.
      max_answer_length: new tokens that a generated answer may have, its <eos> among them.
    """

    tokenizer: Tokenizer
    image_size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    filter: str
    num_visual_tokens: int
    num_images: int
    max_length: int
    max_prompt_length: int
    max_answer_length: int
    independent_turns: bool = False

    def __post_init__(self):
        if self.channels not in (1, 3):
            raise ConfigError(f"config.data.channels: images have 1 or 3 channels, got {self.channels}")
        for key in ("mean", "std"):
            if len(getattr(self, key)) != self.channels:
                raise ConfigError(
                    f"config.processor.{key}: one number a channel, {self.channels}, expected; got {getattr(self, key)}"
                )
        if min(self.std) <= 0:
            raise ConfigError(f"config.processor.std: positive numbers expected, got {self.std}")
        if self.filter not in FILTERS:
            raise ConfigError(f"config.processor.filter: '{self.filter}' is not one of {', '.join(FILTERS)}")

    def __call__(self, sample: Sample) -> Batch:
        """The training row of a sample, as a batch of one.

        Raises:
          SequenceTooLong: the row is longer than max_length.
          ValueError: the sample has another number of images, no turn, or a word that the
            tokenizer does not know; the message names it.
        """
        pieces = self._opening(sample)
        for number, turn in enumerate(sample.turns, 1):
            branch = number if self.independent_turns else 0
            answer = [*self._ids(sample, turn.answer), self.tokenizer.eos_id]
            pieces.append(Text(self._ids(sample, turn.question), branch=branch))
            pieces.append(Text(answer, learned=True, branch=branch))
        row = lay_out(
            pieces,
            self.max_length,
            pad_id=self.tokenizer.pad_id,
            image_id=self.tokenizer.image_id,
            sample_id=sample.sample_id,
        )
        return dataclasses.replace(row, images=self._images(sample))

    def prompt(self, sample: Sample) -> Batch:
        """What the model is given to answer the sample's first question, as a batch of one.

        Returns:
          A Batch of max_prompt_length positions, padded on the left, without targets and weights.

        Raises:
          SequenceTooLong: the prompt is longer than max_prompt_length, or the reference answer is
            longer than max_answer_length, so that no generated answer could equal it.
          ValueError: as for a training row.
        """
        pieces = self._opening(sample)
        pieces.append(Text(self._ids(sample, sample.turns[0].question)))
        answer_length = len(self._ids(sample, sample.turns[0].answer)) + 1
        if answer_length > self.max_answer_length:
            raise SequenceTooLong(
                f"sample '{sample.sample_id}': its reference answer has {answer_length} tokens with the end "
                f"token, over the limit of {self.max_answer_length}; raise config.processor.max_answer_length"
            )
        row = lay_out(
            pieces,
            self.max_prompt_length,
            pad_id=self.tokenizer.pad_id,
            image_id=self.tokenizer.image_id,
            sample_id=sample.sample_id,
            pad_side="left",
            limit_key="config.processor.max_question_length",
        )
        return dataclasses.replace(row, images=self._images(sample), targets=None, loss_weights=None)

    def prepare_image(
        self, image: UInt8[np.ndarray, "height width given"]
    ) -> Float[np.ndarray, "new_height new_width channels"]:
        """One picture of any size as the encoder takes it: converted, resized, normalised."""
        return normalize(resize(to_channels(image, self.channels), self.image_size, self.filter), self.mean, self.std)

    def _opening(self, sample: Sample) -> list[Text | Visual]:
        """The pieces before the first question."""
        if len(sample.images) != self.num_images:
            raise ValueError(
                f"sample '{sample.sample_id}' has {len(sample.images)} images; every sample of this set "
                f"must have {self.num_images}"
            )
        if not sample.turns:
            raise ValueError(f"sample '{sample.sample_id}' has no question")
        pieces: list[Text | Visual] = [Text([self.tokenizer.bos_id])]
        count = self.num_visual_tokens
        pieces += [Visual(image * count, count) for image in range(self.num_images)]
        if sample.context:
            pieces.append(Text(self._ids(sample, sample.context)))
        return pieces

    def _ids(self, sample: Sample, text: str) -> list[int]:
        try:
            return self.tokenizer.encode(text)
        except UnknownText as error:
            raise UnknownText(f"sample '{sample.sample_id}': {error}") from None

    def _images(self, sample: Sample) -> Float[np.ndarray, "1 I height width channels"] | None:
        if not sample.images:
            return None
        return np.stack([self.prepare_image(image) for image in sample.images])[None]
