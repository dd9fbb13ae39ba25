"""From a sample (pictures, questions, answers) to one row of a batch.

The layout of a training row:

    <bos> [visual tokens of image 0] [of image 1] ... [context] question answer <eos> question answer <eos> ...

of which the answers and their <eos> are learned. A prompt is the same row up to its first answer,
padded on the left.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8

from vlm_jax.processors.layout import SequenceTooLong, Text, Visual, lay_out
from vlm_jax.processors.layout_tokenizer import LayoutTokenizer, UnknownText
from vlm_jax.processors.sample_views import Clip, Views, uniform_frames
from vlm_jax.types import Batch, PackedPatches, Sample


@dataclasses.dataclass(frozen=True)
class VqaProcessor:
    """Turns samples into rows of one length.

    Attributes:
      tokenizer: spells questions, answers and context.
      views: makes the images of a batch of a sample's pictures, and says how many tokens they take.
      num_visual_tokens: the most visual tokens of an image; one that took more would be an error.
      num_images: images of every sample, 0 for text alone: pictures, or clips where there are frames.
      num_frames: None, or the frames of a clip: a sample's pictures are then those of one video, in
        order, and so many of them are taken.
      independent_turns: lets no turn of a training row read another, and has each follow the images
        in its positions, as if it were alone: one encoded image serves many questions. Source: Deitke
        et al. 2024 (Molmo), section 3, multi-annotated images.
      max_length: positions of a training row.
      max_prompt_length: positions of a prompt.
      max_answer_length: new tokens that a generated answer may have, its <eos> among them.
    """

    tokenizer: LayoutTokenizer
    views: Views
    num_visual_tokens: int
    num_images: int
    max_length: int
    max_prompt_length: int
    max_answer_length: int
    num_frames: int | None = None
    independent_turns: bool = False

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
        """One picture of any size as one view: converted, resized, normalised."""
        return self.views.picture(image)

    def visual_tokens(self, sample: Sample) -> tuple[int, ...]:
        """How many visual tokens each of the sample's images takes.

        Raises:
          ValueError: an image takes more than `num_visual_tokens`, or the sample has another number of
            images.
        """
        counts = tuple(self.views.count(clip) for clip in self._clips(sample))
        if max(counts, default=0) > self.num_visual_tokens:
            raise ValueError(
                f"sample '{sample.sample_id}': its images take {counts} visual tokens, over the budget of "
                f"{self.num_visual_tokens} each"
            )
        return counts

    def example_images(self) -> Float[np.ndarray, "1 I height width channels"] | PackedPatches:
        """Images of the shapes and dtypes that every row has."""
        blank = np.zeros((1, 1, 1), np.uint8)
        return self.views([[blank] * (self.num_frames or 1)] * self.num_images)

    def _clips(self, sample: Sample) -> list[Clip]:
        """What is looked at: every picture by itself, or the frames that stand for the clip."""
        if self.num_images and self.num_frames is not None:
            if not sample.images:
                raise ValueError(f"sample '{sample.sample_id}' has no frame")
            chosen = uniform_frames(len(sample.images), self.num_frames)
            return [[sample.images[index] for index in chosen]]
        if len(sample.images) != self.num_images:
            raise ValueError(
                f"sample '{sample.sample_id}' has {len(sample.images)} images; every sample of this set "
                f"must have {self.num_images}"
            )
        return [[image] for image in sample.images]

    def _opening(self, sample: Sample) -> list[Text | Visual]:
        """The pieces before the first question."""
        counts = self.visual_tokens(sample)
        if not sample.turns:
            raise ValueError(f"sample '{sample.sample_id}' has no question")
        pieces: list[Text | Visual] = [Text([self.tokenizer.bos_id])]
        pieces += [Visual(sum(counts[:image]) + np.arange(count)) for image, count in enumerate(counts)]
        if sample.context:
            pieces.append(Text(self._ids(sample, sample.context)))
        return pieces

    def _ids(self, sample: Sample, text: str) -> list[int]:
        try:
            return self.tokenizer.encode(text)
        except UnknownText as error:
            raise UnknownText(f"sample '{sample.sample_id}': {error}") from None

    def _images(self, sample: Sample) -> Float[np.ndarray, "1 I height width channels"] | PackedPatches | None:
        clips = self._clips(sample)
        return self.views(clips) if clips else None
