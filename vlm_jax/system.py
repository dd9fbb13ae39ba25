"""A system: a model with its processor, from a release or from a config."""

import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from vlm_jax.checkpoints.release import Release
from vlm_jax.generation.engine import prepared
from vlm_jax.generation.likelihood import Likelihood, log_likelihoods
from vlm_jax.generation.released import greedy_sampling
from vlm_jax.generation.sampling import Sampling
from vlm_jax.generation.text import Completion, complete
from vlm_jax.models.vlm import VLM
from vlm_jax.processors.conversation import Conversation, Picture, Video
from vlm_jax.processors.image_text import ImageTextProcessor
from vlm_jax.processors.processor import Processor
from vlm_jax.sharding.initial import Init, boxed_shapes, draw, in_float32, init_of
from vlm_jax.sharding.rules import generation_mesh, mesh_of, shardings
from vlm_jax.types import TEXT_SLOT, Batch, Fields, Grid, Params, RowShape, Tree


class UnsupportedError(ValueError):
    """An operation that a model does not support, such as generation without a decoder; the message has the fix."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """Visual tokens of one image, with all its tiles or frames.

    Attributes:
      entering: tokens that enter the decoder; the maximum where every image has its own grid.
      by_layer: tokens in every layer of the decoder.
      grid: rows and columns of the encoder's patches for one tile; None where every image has its own.
    """

    entering: int
    by_layer: tuple[int, ...]
    grid: Grid | None = None

    @property
    def left(self) -> int:
        """Tokens in the last layer."""
        return self.by_layer[-1]

    @property
    def mean(self) -> float:
        """The mean over the decoder's layers."""
        return sum(self.by_layer) / len(self.by_layer)


@dataclasses.dataclass(frozen=True)
class System:
    """A model with its processor, without parameters.

    Attributes:
      model: the Linen module: a `VLM`, a `TwoTower`, a classifier, or a part of one.
      inputs: shapes of the arguments of its `__call__`, for computing the shapes of its parameters.
      make_processor: creates the processor on first use, so that a release without the files of its
        processor can still be loaded and applied.
      make_ends: likewise the ids of the tokens that end an answer.
      release: the released checkpoint; None where all parameters are randomly initialised.
      budget: visual tokens of an image, where a config has a token budget; else None.
    """

    model: nn.Module
    inputs: tuple[Tree, ...]
    make_processor: Callable[[], Processor | ImageTextProcessor]
    make_ends: Callable[[], tuple[int, ...]]
    release: Release | None = None
    budget: Budget | None = None

    @functools.cached_property
    def any_processor(self) -> Processor | ImageTextProcessor:
        """The processor of any model."""
        return self.make_processor()

    @property
    def processor(self) -> Processor:
        """The processor of conversations.

        Raises:
          UnsupportedError: the model is a two-tower model or a classifier.
        """
        processor = self.any_processor
        if isinstance(processor, ImageTextProcessor):
            raise UnsupportedError(
                f"a {type(self.model).__name__} has no conversations; call "
                "processor(images=…, texts=…) and logits, encode_images or encode_texts"
            )
        return processor

    def thinking(self, enable: bool | None) -> "System":
        """The same with a processor as of `Processor.thinking`."""
        if enable is None:
            return self
        processor = self.processor.thinking(enable)
        return dataclasses.replace(self, make_processor=lambda: processor)

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer."""
        return self.make_ends()

    @functools.cached_property
    def sampling(self) -> Sampling:
        """How tokens are selected by default: greedily, as the release's generation settings modify it."""
        return Sampling() if self.release is None else greedy_sampling(self.release.folder)

    def example(self, shape: RowShape) -> Batch:
        """Shapes of one training row with its images, for `eval_shape` and the planner."""
        return self.processor.example_row(shape)

    @property  # not kept: worker processes that load data get a copy of the system, and it cannot be pickled
    def _init(self) -> Init:
        """Initialises the boxed parameters; a part does not depend on the kinds of the others."""
        model = self.model
        if self.release is not None and isinstance(model, VLM) and model.reducer is not None:
            # A reducer has no parameters, and the smallest input of the release may have too few tokens for it.
            decoder = None if model.decoder is None else model.decoder.clone(drops=())
            model = model.clone(reducer=None, decoder=decoder)
        return init_of(model, self.inputs)

    def boxed_shapes(self) -> Params:
        """Shapes of the parameters, in the boxes that name their axes; traced once."""
        return dict(self._boxed_shapes)

    @functools.cached_property
    def _boxed_shapes(self) -> Params:
        return boxed_shapes(self._init)

    def initial(
        self, key: jax.Array, mesh: Mesh | None = None, *, without: Sequence[str] = (), masters: Collection[str] = ()
    ) -> Params:
        """Parameters on their devices: read from the release, or randomly initialised where it lacks them.

        No host holds a parameter twice: tensors are read in parts, directly to the devices that need them, and
        parameters that are read are not initialised.

        Args:
          key: random key of the initialisation.
          mesh: mesh of the parameters; the default device when None.
          without: parts to omit, which the caller has from elsewhere.
          masters: paths of parameters that are read and returned in float32, for any `param_dtype` of the model.

        Raises:
          CheckpointMismatch: unused and missing keys and wrong shapes of the release, all in one message.
          CheckpointError: of a run, there is no complete checkpoint.
        """
        boxed = in_float32(self.boxed_shapes(), masters)
        targets = nn.meta.unbox(boxed)
        if mesh is not None:
            targets = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                targets,
                shardings(boxed, mesh),
            )
        targets = {part: tree for part, tree in targets.items() if part not in without}
        release = self.release.without(*without) if self.release is not None and without else self.release
        drawn = [part for part in targets if release is None or part in release.initialised]
        params = {} if release is None else release.read(targets)
        if drawn:
            params |= in_float32(draw(self._init, key, drawn, mesh), masters)
        return {part: params[part] for part in targets}

    def borrowed(self, params: Params) -> Params:
        """The parts that a reducer reads of other checkpoints, where `params` of the release lack them."""
        others = () if self.release is None else self.release.borrowed
        if all(other.part in params for other in others):
            return {}
        return self.initial(jax.random.key(0), mesh_of(params), without=tuple(params))

    def prepared(self, params: Params) -> Params:
        """Parameters in the layout for generation, for callers that generate more than once."""
        return prepared(params, generation_mesh(params))

    def answer(
        self,
        params: Params,
        conversations: Sequence[Conversation],
        images: Sequence[Sequence[Picture]] = (),
        videos: Sequence[Sequence[Video]] = (),
        *,
        max_new_tokens: int,
        processor_options: Fields | None = None,
        names: Sequence[str] | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Generates answers to a batch of conversations.

        Args:
          params: of the model, or the result of `prepared`.
          conversations, images, videos: as in `Processor.batch`.
          max_new_tokens: maximum tokens of an answer.
          processor_options: further arguments of `Processor.batch`.
          names: names of the conversations in errors.
          **options: `end_ids`, tokens that end an answer in addition to `ends`; `sampling`, by default that of
            the property of this name; `on_text`, called with the index of a
            conversation and each piece of its answer as it is generated; `mesh`, by default that of the parameters,
            or None where it shards the sequence; other arguments of `generation.text.complete` and
            `generation.engine.generate`.

        Raises:
          GenerationError: a setting outside its range, a prompt that does not fit, or NaN logits.
        """
        batch = self.processor.batch(conversations, images, videos, **(processor_options or {}))
        names = names or [f"conversation {number}" for number in range(len(conversations))]
        return self.complete(params, batch, max_new_tokens=max_new_tokens, names=names, **options)

    def complete(
        self,
        params: Params,
        prompts: Batch,
        *,
        max_new_tokens: int,
        names: Sequence[str],
        end_ids: Sequence[int] = (),
        sampling: Sampling | Sequence[Sampling] | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Answers to prompts that the processor has laid out; arguments as of `answer`, whose answers these are."""
        answers = complete(
            self.model,
            params,
            prompts,
            self.processor.tokenizer,
            end_ids=self._sayable(self.ends) + tuple(end_ids),
            max_new_tokens=max_new_tokens,
            names=names,
            sampling=self.sampling if sampling is None else sampling,
            **{"mesh": generation_mesh(params), **options},
        )
        for answer, entering in zip(answers, np.count_nonzero(prompts.visual_index != TEXT_SLOT, axis=1), strict=True):
            if answer.visual_tokens and answer.visual_tokens[0] != entering:
                raise AssertionError(f"{entering} visual tokens were laid out, the decoder got {answer.visual_tokens}")
        return answers

    def log_likelihoods(
        self,
        params: Params,
        conversations: Sequence[Conversation],
        continuations: Sequence[str],
        images: Sequence[Sequence[Picture]] = (),
        videos: Sequence[Sequence[Video]] = (),
        *,
        processor_options: Fields | None = None,
        names: Sequence[str] | None = None,
        **options: Any,
    ) -> list[Likelihood]:
        """The likelihood of a text as the answer, or its start, to each conversation of a batch.

        Args:
          params, conversations, images, videos, processor_options, names: as of `answer`.
          continuations: of every conversation; it follows the generation prompt as it is, so that a space between
            them belongs to it, and no end token is added.
          **options: other arguments of `generation.likelihood.log_likelihoods`.

        Raises:
          PromptError: not one text for each conversation, or an empty one.
          GenerationError: as of `generation.likelihood.log_likelihoods`.
        """
        given = {"continuations": continuations, **(processor_options or {})}
        batch = self.processor.batch(conversations, images, videos, **given)
        names = names or [f"conversation {number}" for number in range(len(conversations))]
        return log_likelihoods(self.model, params, batch, names=names, mesh=mesh_of(params), **options)

    def _sayable(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The ids in the model's vocabulary; a folder may list others."""
        model: Any = self.model
        return tuple(index for index in ids if index < model.decoder.vocab_size)

    def save_pretrained(self, folder: str | os.PathLike[str], params: Params, **options: Any) -> tuple[Path, ...]:
        """Writes the release with other parameters; see `Release.save`.

        Raises:
          UnsupportedError: there is no release.
        """
        if self.release is None:
            raise UnsupportedError("a model from a config has no released schema; use its run's checkpoints")
        return self.release.save(folder, params, **options)
