"""The result of `from_pretrained`: a released system with its parameters."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax.checkpoints.hub import Checkpoint
from vlm_jax.checkpoints.release import Release
from vlm_jax.generation.engine import prepared
from vlm_jax.generation.likelihood import Likelihood
from vlm_jax.generation.sampling import GenerationError, Sampling
from vlm_jax.generation.text import Completion, check_function, check_strings
from vlm_jax.models.two_tower import Embeddings, TwoTower
from vlm_jax.pretrained.budgets import Section, with_budget
from vlm_jax.pretrained.family import PretrainedError, marker
from vlm_jax.pretrained.processing import has_image_text_processor, image_text
from vlm_jax.pretrained.processing.settings import write_image_size
from vlm_jax.processors.conversation import Conversation, Picture, Video
from vlm_jax.processors.grounding import Block, NamedBox, answer_boxes, document_blocks
from vlm_jax.processors.image import height_and_width, to_picture
from vlm_jax.processors.image_text import SquareInputs
from vlm_jax.processors.native import NativeViews
from vlm_jax.processors.processor import check_continuations
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tiling import Size
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.sharding.rules import in_mesh, mesh_of
from vlm_jax.system import System
from vlm_jax.types import Batch, Config, Fields, ImageTextBatch, Params, Tree


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A released model, ready to be applied, trained on, or written back.

    Attributes:
      system: the model, its processor and its release.
      params: its parameters, a tree without boxes.
      image_size: side in pixels requested at load, which overrides the folder's; None for the folder's.
    """

    system: System
    params: Params
    image_size: int | None = None

    @property
    def module(self) -> nn.Module:
        """The Linen module."""
        return self.system.model

    @property
    def release(self) -> Release:
        """The released checkpoint: its tensors, rules and files."""
        assert self.system.release is not None
        return self.system.release

    @property
    def config(self) -> Config:
        """The released settings, in the schema of the release."""
        return self.release.config

    @property
    def checkpoint(self) -> Checkpoint:
        """The released tensors."""
        return self.release.checkpoint

    @property
    def folder(self) -> Path:
        """The folder of the release."""
        return self.release.folder

    @property
    def processor(self) -> Any:
        """The processor, configured by the release's own files.

        A `processors.processor.Processor` for conversations and images; for a two-tower model or a classifier an
        `processors.image_text.ImageTextProcessor` for images and texts.

        Raises:
          PretrainedError: the release has none, or its files have unsupported settings, or do not fit
            the model.
          TokenizerError, ChatTemplateError: the folder has no tokenizer, or no chat template.
        """
        return self.system.any_processor

    def with_budget(
        self, tokens: int | None = None, *, reducer: Section | None = None, connector: Section | None = None
    ) -> "Pretrained":
        """The model with a token budget; parameters are shared, except random ones of a new connector, and
        those that a reducer needs of another checkpoint.

        Args:
          tokens, reducer, connector: as in `budgets.with_budget`.

        Raises:
          InfeasibleBudget, ConfigError: as there.
        """
        system = with_budget(self.system, tokens, reducer=reducer, connector=connector)
        drawn = set() if system.release is None else set(system.release.drawn) - set(self.release.drawn)
        params = self.params
        if drawn:
            kept = {part: tree for part, tree in params.items() if part not in drawn}
            params = kept | system.initial(jax.random.key(0), mesh_of(params), without=tuple(kept))
        return Pretrained(system, params | system.borrowed(params), self.image_size)

    def count_visual_tokens(self, image_sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Number of visual tokens of each image of one conversation, without running the model.

        Args:
          image_sizes: (height, width) of every image, in pixels.
        """
        return self.system.processor.count_visual_tokens(image_sizes)

    def apply(self, *args: Tree, **kwargs: Any) -> Tree:
        """`module.apply` with the parameters; `method=` and `mutable=` as there."""
        return self.module.apply({"params": self.params}, *args, **kwargs)

    def logits(self, batch: Batch | ImageTextBatch) -> Float[Array, "B T V"] | Float[Array, "B classes"]:
        """Float32 logits of a batch of `processor`, compiled once for its shapes.

        Returns:
          For conversations, vocabulary logits at every position. For a two-tower model, [images, texts]: the scaled
          similarity of every image with every text. For a classifier, logits of its classes; see `labels`.

        Raises:
          PretrainedError: the model has no head, or the batch lacks images or texts of a two-tower model.
        """
        return self._logits(self.params, batch)

    @functools.cached_property
    def _logits(self) -> Callable[..., jax.Array]:
        def run(params: Params, batch: Batch | ImageTextBatch) -> Tree:
            inputs = batch.inputs if isinstance(batch, ImageTextBatch) else (batch,)
            if isinstance(self.module, TwoTower) and len(inputs) < 2:
                raise PretrainedError("logits of a two-tower model need images and texts; pass the processor both")
            found = self.module.apply({"params": params}, *inputs)
            if isinstance(found, Embeddings):
                return found.logits()
            if not isinstance(found, jax.Array):
                raise PretrainedError(
                    f"'{marker(self.config)}' has no head in this checkpoint; call apply for features"
                )
            return found

        return in_mesh(jax.jit(run), mesh_of(self.params))

    def encode_images(self, images: Sequence[Picture]) -> Float[Array, "B E"]:
        """Float32 embeddings of images by the image tower, not normalised, compiled once per number of images."""
        return self._encoder("encode_image")(self.params, self.processor(images=images).images)

    def encode_texts(self, texts: Sequence[str]) -> Float[Array, "B E"]:
        """The same for texts by the text tower, for `evals.zero_shot.class_embeddings`."""
        return self._encoder("encode_text")(self.params, self.processor(texts=texts).tokens)

    def _encoder(self, method: str) -> Callable[..., jax.Array]:
        if not isinstance(self.module, TwoTower):
            raise PretrainedError(f"'{marker(self.config)}' is not a two-tower model")
        return self._encoders[method]

    @functools.cached_property
    def _encoders(self) -> Fields:
        def encode(method: str, params: Params, given: Tree) -> jax.Array:
            return jnp.asarray(self.module.apply({"params": params}, given, method=method), jnp.float32)

        mesh = mesh_of(self.params)
        names = ("encode_image", "encode_text")
        return {name: in_mesh(jax.jit(functools.partial(encode, name)), mesh) for name in names}

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of a classifier's classes, in the order of its logits; raises a `PretrainedError` for other models."""
        return image_text.labels(self.config)

    @functools.cached_property
    def _laid_out(self) -> Params:
        """The parameters in the layout for generation, cached; on a CPU with a second copy of the decoder's kernels."""
        return prepared(self.params, mesh_of(self.params))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the folder; raises a `TokenizerError` if there is none."""
        return Tokenizer.from_folder(self.folder)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer; see `processing.end_ids`."""
        return self.system.ends

    def generate(
        self,
        messages: Conversation,
        images: Sequence[Picture] = (),
        videos: Sequence[Video] = (),
        *,
        max_new_tokens: int,
        max_visual_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        stop_tokens: Sequence[str] = (),
        processor_options: Config = MappingProxyType({}),
        on_text: Callable[[str], None] | None = None,
        **options: Any,
    ) -> Completion:
        """Generates the answer to a conversation.

        Args:
          messages, images, videos: as in `Processor.batch`.
          max_new_tokens: maximum tokens of the answer.
          max_visual_tokens: maximum visual tokens of an image; the release's limit when None.
          sampling: sampling settings; by default the most likely token, with `repetition_penalty` and
            `no_repeat_ngram_size` of the release's `generation_config.json`.
          stop: strings before which the answer ends.
          stop_tokens: names of tokens that end it, in addition to `end_ids`.
          processor_options: further arguments of `Processor.batch`, and variables of the chat template, such as
            `fps` and `enable_thinking`.
          on_text: called with each piece of the answer as it is generated.
          **options: arguments of `generation.engine.generate`, such as `chunk`, `cache_dtype` and `cache_length`.

        Raises:
          GenerationError: a setting outside its range, a prompt that does not fit, parameters on a mesh that shards the
            sequence, or NaN logits.
          TokenizerError: a name of `stop_tokens` that the vocabulary lacks, or no tokenizer in the folder.
          ChatTemplateError: no template in the folder, or messages that it rejects.
        """
        self.system.processor  # noqa: B018 (raises for a model without conversations)
        check_strings(stop_tokens, "stop_tokens")
        check_function(on_text, "on_text")
        if not isinstance(processor_options, Mapping):
            raise GenerationError(f"processor_options: expected a dict, got {processor_options!r}")
        for name in ("names", "mesh", "end_ids"):
            if name in options:
                raise GenerationError(f"{name}: is set by generate; remove it")
        options["names"] = ("prompt",)
        (answer,) = self.system.answer(
            self._laid_out,
            [messages],
            [images],
            [videos],
            max_new_tokens=max_new_tokens,
            end_ids=tuple(map(self.tokenizer.id_of, stop_tokens)),
            on_text=None if on_text is None else lambda row, text: on_text(text),
            processor_options={"max_visual_tokens": max_visual_tokens, **processor_options},
            stop=stop,
            sampling=sampling,
            mesh=mesh_of(self.params),
            **options,
        )
        return answer

    def log_likelihoods(
        self,
        messages: Conversation,
        continuations: Sequence[str],
        images: Sequence[Picture] = (),
        videos: Sequence[Video] = (),
        *,
        max_visual_tokens: int | None = None,
        processor_options: Config = MappingProxyType({}),
    ) -> list[Likelihood]:
        """How probable the model finds each of several answers to a conversation, such as those of a multiple choice.

        Args:
          messages, images, videos, max_visual_tokens, processor_options: as of `generate`.
          continuations: the answers, or their starts; as of `System.log_likelihoods`.

        Raises:
          PromptError, GenerationError: as of `System.log_likelihoods`.
        """
        check_continuations(continuations, len(continuations))
        count = len(continuations)
        return self.system.log_likelihoods(
            self._laid_out,
            [messages] * count,
            continuations,
            [images] * count,
            [videos] * count,
            processor_options={"max_visual_tokens": max_visual_tokens, **processor_options},
        )

    def boxes(self, answer: Completion, image: Picture, *, max_visual_tokens: int | None = None) -> list[NamedBox]:
        """The boxes of an answer, in pixels of the image; may be empty.

        Args:
          answer: from `generate`.
          image: the image of the answer.
          max_visual_tokens: the value passed to `generate`.
        """
        # Tags of boxes are special tokens in some vocabularies, which the answer's text omits.
        text = self.tokenizer.decode(answer.tokens, skip_special=False)
        return answer_boxes(text, *self._sizes(image, max_visual_tokens))

    def document(self, answer: Completion, image: Picture, *, max_visual_tokens: int | None = None) -> list[Block]:
        """The blocks of an answer that is a document in HTML, as written by Qwen2.5-VL; arguments as in `boxes`."""
        return document_blocks(answer.text, *self._sizes(image, max_visual_tokens))

    def _sizes(self, image: Picture, max_visual_tokens: int | None) -> tuple[Size, Size | None]:
        """The size of an image, and its size in the unit of the answer's boxes if that is not their own."""
        size, views = height_and_width(to_picture(image)), self.system.processor.views
        if not isinstance(views, NativeViews):
            return size, None
        if views.box_scale is not None:
            return size, (views.box_scale, views.box_scale)
        views = views if max_visual_tokens is None else views.within(max_visual_tokens)
        return size, views.size(size)

    def save_pretrained(self, folder: str | os.PathLike[str], *, params: Params | None = None) -> tuple[Path, ...]:
        """Writes config and weights under the released names, in the format of the release.

        The files of the tokenizer, the chat template and the processor are copied.

        Args:
          folder: created if missing; must not contain a checkpoint.
          params: parameters to write instead of `self.params`, such as trained ones.

        Returns:
          The files written.

        Raises:
          CheckpointFileError: the folder contains a checkpoint.
          CheckpointMismatch: the shapes of `params` and `self.params` differ.
        """
        views = self._resized_views()

        def finish(written: Path) -> None:
            if views is not None:
                write_image_size(written, views)

        return self.release.save(folder, self.params if params is None else params, finish=finish)

    def _resized_views(self) -> SquareViews | None:
        """The views of a model that was resized at load and has a processor; else None, which keeps its files."""
        if self.image_size is None or not has_image_text_processor(marker(self.config)):
            return None
        try:
            images = self.processor.images
        except PretrainedError:
            return None
        return images.views if isinstance(images, SquareInputs) else None
