"""What the adapters share: a release with a token budget, generation settings of requests, and batches of them."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from vlm_jax.config import ConfigError, check_fields, did_you_mean, parse
from vlm_jax.generation.likelihood import Likelihood
from vlm_jax.generation.sampling import GenerationError, Sampling
from vlm_jax.generation.text import RowSettings
from vlm_jax.pretrained import from_pretrained
from vlm_jax.processors.conversation import Conversation
from vlm_jax.ranges import Seed, Side, Size
from vlm_jax.sharding.mesh import make_generation_mesh
from vlm_jax.types import Config, Fields

LOG = logging.getLogger(__name__)
READ = (
    "max_new_tokens",
    "until",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "seed",
)
# Other settings of generation -> values that ask for what is done in any case.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "image_aspect_ratio": ("original",),
    "num_beams": (1,),
    "skip_special_tokens": (True,),
    "use_cache": (True,),
}
OF_SAMPLING = ("temperature", "top_p", "top_k")
Asked = TypeVar("Asked")


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Arguments of a model.

    Attributes:
      pretrained: a released folder, or another source of `vlm_jax.from_pretrained`.
      token_budget, reducer: visual tokens of an image, as `vlm_jax.from_pretrained` takes them.
      adapter, image_size, dtype: likewise.
      mesh: devices along the axes of a mesh, such as `tensor:4+data:2`; one device when None.
      batch_size: requests that are answered together.
      max_visual_tokens: maximum visual tokens of an image; the release's limit when None.
      enable_thinking: whether the model may think first, where its chat template has this variable; the template's
        default when None.
      max_new_tokens: maximum tokens of an answer, of requests that do not say it.
      seed: of sampling, of requests that do not say it.
      ignore: names of settings of requests that are not read, joined by `+`; any other that is not supported is an
        error.

    Raises:
      ConfigError: a value of another type, or outside its range.
    """

    pretrained: str
    token_budget: Size | None = None
    reducer: str | dict[str, Any] | None = None
    adapter: str | None = None
    image_size: Side | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    mesh: str | None = None
    batch_size: Size = 1
    max_visual_tokens: Size | None = None
    enable_thinking: bool | None = None
    max_new_tokens: Size = 1024
    seed: Seed = 0
    ignore: str = ""

    def __post_init__(self):
        check_fields(self, "model_args.")


@dataclasses.dataclass(frozen=True)
class AnswerSettings:
    """How a request is answered.

    Attributes:
      max_new_tokens: maximum tokens of the answer.
      stop: strings before which it ends.
      sampling: of its tokens.
    """

    max_new_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling


@dataclasses.dataclass(frozen=True)
class Answered:
    """The answer to a request.

    Attributes:
      text: without end tokens.
      prompt_tokens: tokens of the prompt, with its visual tokens.
      new_tokens: tokens of the answer, with its end token.
      visual_tokens: visual tokens that enter the decoder, of all images and videos.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    visual_tokens: int


class HarnessModel:
    """A release that answers the requests of a harness in batches.

    Attributes:
      settings: its arguments.
    """

    def __init__(self, arguments: Config):
        """Loads the release.

        Args:
          arguments: names and values of `ModelSettings`.

        Raises:
          ConfigError: an unknown name, or a value outside its range.
          Others as `vlm_jax.from_pretrained`.
        """
        self.settings = settings = parse(ModelSettings, arguments, "model_args")
        self._ignored = frozenset(filter(None, settings.ignore.split("+")))
        self._told: set[str] = set()
        model = from_pretrained(
            settings.pretrained,
            dtype=settings.dtype,
            mesh=None if settings.mesh is None else make_generation_mesh(settings.mesh, "model_args.mesh"),
            image_size=settings.image_size,
            token_budget=settings.token_budget,
            reducer=settings.reducer,
            adapter=settings.adapter,
        )
        self._system = model.system.thinking(settings.enable_thinking)
        self._params = self._system.prepared(model.params)
        self._options: Fields = {"max_visual_tokens": settings.max_visual_tokens}
        self._system.processor  # noqa: B018 (raises for a model without conversations)

    def answer_settings(self, given: Config) -> AnswerSettings:
        """The settings of a request.

        Greedy unless `do_sample` is true or, where that is missing, the temperature is above 0, as in lmms-eval; with
        the release's repetition penalty.

        Args:
          given: keyword arguments of generation, as of transformers, and `until`; one that is None counts as missing.

        Raises:
          GenerationError: one that is not supported, or a value outside its range.
        """
        own = {key: value for key, value in given.items() if value is not None and key not in self._ignored}
        for key, value in own.items():
            if key in READ or any(type(value) is type(one) and value == one for one in NEUTRAL.get(key, ())):
                continue
            fix = "" if key in NEUTRAL else did_you_mean(key, READ)
            raise GenerationError(
                f"generation setting {key}={value!r}: is not supported{fix}; remove it from the request, or answer "
                f"without it by the model argument ignore={'+'.join(sorted({*self._ignored, key}))}"
            )
        limit, until = own.get("max_new_tokens", self.settings.max_new_tokens), own.get("until", ())
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise GenerationError(f"max_new_tokens: expected 1 or more, got {limit!r}")
        stop = (until,) if isinstance(until, str) else tuple(until)
        return AnswerSettings(limit, stop, self._sampling(own))

    def _sampling(self, own: Config) -> Sampling:
        release = self._system.sampling
        penalty = own.get("repetition_penalty", release.repetition_penalty)
        temperature, top_p, top_k = (own.get(name) for name in OF_SAMPLING)
        if not own.get("do_sample", bool(temperature)):
            for name, neutral in (("temperature", (0, 1)), ("top_p", (0, 1)), ("top_k", (0, 1))):
                if own.get(name, neutral[0]) not in neutral:
                    self._tell(f"{name}={own[name]} has no effect on greedy answers; set do_sample=true to sample")
            return dataclasses.replace(release, repetition_penalty=penalty)
        if temperature == 0:
            raise GenerationError("temperature: expected more than 0 with do_sample=true, got 0")
        return dataclasses.replace(
            release,
            temperature=1.0 if temperature is None else temperature,
            top_k=top_k or None,
            top_p=None if top_p == 1 else top_p,
            repetition_penalty=penalty,
            seed=own.get("seed", self.settings.seed),
        )

    def _tell(self, message: str) -> None:
        """Logs a message once."""
        if message not in self._told:
            self._told.add(message)
            LOG.warning(message)

    def answers(
        self,
        requests: Sequence[tuple[Callable[[], Conversation], AnswerSettings]],
        on_batch: Callable[[int], object] = lambda count: None,
    ) -> list[Answered]:
        """Answers to requests, in their order; those with equal settings form batches.

        Args:
          requests: of each what makes its messages, called with its batch so that few pictures are in memory, and its
            settings.
          on_batch: called with the number of requests of a batch after it.

        Raises:
          As `System.answer`.
        """
        found: dict[int, Answered] = {}
        kinds: dict[AnswerSettings, list[int]] = {}
        for number, (_, settings) in enumerate(requests):
            kinds.setdefault(settings, []).append(number)
        for settings, numbers in kinds.items():
            for batch, fill in self._batches(numbers):
                found |= zip(batch, self._answer([requests[n][0]() for n in batch], batch, settings, fill), strict=True)
                on_batch(len(batch))
        return [found[number] for number in range(len(requests))]

    def _answer(
        self, conversations: Sequence[Conversation], numbers: tuple[int, ...], settings: AnswerSettings, fill: int
    ) -> list[Answered]:
        """Answers to one batch; `fill` rows are added, which leave it after the prompt."""
        processor = self._system.processor
        names = [f"request {number}" for number in numbers]
        examples = [
            processor.example(messages, name=name, **self._options)
            for messages, name in zip(conversations, names, strict=True)
        ]
        filled = [*examples, *examples[-1:] * fill]
        completed = self._system.complete(
            self._params,
            processor.rows([[example] for example in filled], targets=False),
            max_new_tokens=settings.max_new_tokens,
            names=[*names, *names[-1:] * fill],
            stop=settings.stop,
            sampling=settings.sampling,
            rows=[*numbers, *numbers[-1:] * fill],  # random numbers of a request do not depend on its batch
            settings=[RowSettings()] * len(examples) + [RowSettings(leaves=lambda: True)] * fill,
        )
        return [
            Answered(answer.text, example.load.length, len(answer.tokens), sum(example.visual_tokens))
            for answer, example in zip(completed, examples, strict=False)
        ]

    def log_likelihoods(
        self,
        requests: Sequence[tuple[Callable[[], Conversation], str]],
        on_batch: Callable[[int], object] = lambda count: None,
    ) -> list[Likelihood]:
        """The likelihood of each request's continuation, in their order; arguments as of `answers`.

        Raises:
          As `System.log_likelihoods`.
        """
        found: list[Likelihood] = []
        for batch, fill in self._batches(range(len(requests))):
            filled = [requests[number] for number in batch]
            filled += filled[-1:] * fill
            likelihoods = self._system.log_likelihoods(
                self._params,
                [messages() for messages, _ in filled],
                [continuation for _, continuation in filled],
                processor_options=self._options,
                names=[f"request {number}" for number in (*batch, *batch[-1:] * fill)],
            )
            found += likelihoods[: len(batch)]
            on_batch(len(batch))
        return found

    def _batches(self, numbers: Sequence[int]) -> Iterator[tuple[tuple[int, ...], int]]:
        """The numbers in batches, each with the rows that it lacks, so that programs of one size are compiled."""
        size = self.settings.batch_size
        given = iter(numbers)
        while batch := tuple(itertools.islice(given, size)):
            yield batch, size - len(batch)


def whole_number(value: object, name: str) -> object:
    """A number that a command line gives as text, as an int; other values as they are.

    Raises:
      ConfigError: another text, such as `auto`.
    """
    if not isinstance(value, str):
        return value
    if not value.isdecimal():
        raise ConfigError(f"{name}: expected a whole number, got '{value}'")
    return int(value)
