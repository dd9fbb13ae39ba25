"""The models of lmms-eval (0.7): `lmms-eval --model vlm_jax --model_args pretrained=DIR,token_budget=64`."""

import abc
import dataclasses
import functools
import mimetypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts  # type: ignore
from lmms_eval.api.model import lmms  # type: ignore
from PIL import Image
from tqdm import tqdm

from vlm_jax.config import ConfigError
from vlm_jax.generation.sampling import GenerationError
from vlm_jax.harnesses.model import Answered, HarnessModel, whole_number
from vlm_jax.processors.conversation import Conversation
from vlm_jax.processors.learned import PromptError
from vlm_jax.types import Config, Fields

# The messages of a round, or None after the last one; and what the task keeps for the next.
Round = tuple[Sequence[Config] | None, Any]


@dataclasses.dataclass
class VisualTokenCounts(TokenCounts):
    """Tokens of a request; `input_tokens` has the visual tokens too.

    Attributes:
      visual_tokens: visual tokens that enter the decoder.
    """

    visual_tokens: int | None = None

    def to_dict(self) -> dict[str, int | None]:
        """As lmms-eval logs them with a sample."""
        return {**super().to_dict(), "visual_tokens": self.visual_tokens}


class LikelihoodResult(GenerationResult):
    """A pair (likelihood, whether it is the greedy answer) as `text`, which lmms-eval 0.7 hands on as it is.

    It makes a text of a bare pair (api/instance.py, unwrap_generation_output), which its metrics cannot read.
    """

    def __init__(self, pair: tuple[float, bool]):
        self.text: Any = pair
        self.token_counts = None

    def __iter__(self) -> Iterator[float | bool]:
        """The pair, which the interface of a model names."""
        return iter(self.text)


class _Model(lmms):
    """What both forms of the model share; they differ in the arguments of requests."""

    def __init__(self, *, batch_size: int | str = 1, **arguments: Any):
        """Loads a release.

        Args:
          batch_size: of `--batch_size`.
          **arguments: of `--model_args`, the fields of `harnesses.model.ModelSettings`; others of the command line,
            `--device` and `--max_batch_size`, are refused, since JAX selects the device.

        Raises:
          ConfigError: an argument that is not read, or several processes.
          Others as `vlm_jax.from_pretrained`.
        """
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ConfigError("WORLD_SIZE: expected one process; run lmms-eval without a launcher")
        self.model = HarnessModel({**arguments, "batch_size": whole_number(batch_size, "batch_size")})

    @property
    def batch_size(self) -> int:
        """Requests that are answered together."""
        return self.model.settings.batch_size

    def _document(self, task: str, split: str, number: int) -> Any:
        return self.task_dict[task][split][number]

    @abc.abstractmethod
    def _request(self, request: Instance) -> tuple[Callable[[], Sequence[Config]], Config]:
        """What makes the messages of a request for one answer, and its generation settings."""

    @abc.abstractmethod
    def _rounds(self, request: Instance) -> tuple[Callable[[int, list[str], Any], Round], Config]:
        """What makes the messages of a round, from its number and the answers before it, and generation settings."""

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """An answer to each request, with its numbers of tokens.

        Raises:
          GenerationError: a generation setting that is not supported.
          PromptError: a message that is not read.
        """
        asked = []
        for request in requests:
            messages, given = self._request(request)
            asked.append((functools.partial(_conversation, messages), self.model.answer_settings(given)))
        with tqdm(total=len(requests), desc="Model Responding") as bar:
            answers = self.model.answers(asked, bar.update)
        return [GenerationResult(answer.text, _counts([answer])) for answer in answers]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """The answers to the rounds of each request, a list of texts; equal rounds of requests form batches.

        Raises:
          As `generate_until`.
        """
        given = [self._rounds(request) for request in requests]
        settings = [self.model.answer_settings(kwargs) for _, kwargs in given]
        answers: list[list[Answered]] = [[] for _ in requests]
        kept: list[Any] = [None] * len(requests)
        active = list(range(len(requests)))
        while active:
            going, asked = [], []
            for number in active:
                said = [answer.text for answer in answers[number]]
                messages, kept[number] = given[number][0](len(said), said, kept[number])
                if messages is not None:
                    going.append(number)
                    asked.append((functools.partial(_read, messages), settings[number]))
            for number, answer in zip(going, self.model.answers(asked), strict=True):
                answers[number].append(answer)
            active = going
        return [GenerationResult([answer.text for answer in of_one], _counts(of_one)) for of_one in answers]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[LikelihoodResult]:
        """(likelihood, whether it is the greedy answer) of the continuation of each request.

        For a task of the output type `loglikelihood` the log-likelihood, the sum over its tokens. For `multiple_choice`
        its negative, since lmms-eval takes the choice with the smallest number there (api/task.py, process_results).

        Raises:
          GenerationError: a request without a document.
        """
        asked, signs = [], []
        for request in requests:
            if len(request.args) != 6:
                raise GenerationError(
                    "loglikelihood: expected the six arguments of a request with a document, got "
                    f"{len(request.args)}; remove the metric acc_mutual_info, which takes the largest number where acc "
                    "takes the smallest"
                )
            context, continuation, to_visual, number, task, split = request.args
            is_choice = isinstance(continuation, str)
            if not is_choice:
                continuation = continuation(self._document(task, split, number))
            messages = functools.partial(self._shown, to_visual, context, number, task, split)
            asked.append((functools.partial(_conversation, messages), continuation))
            signs.append(-1.0 if is_choice else 1.0)
        with tqdm(total=len(requests), desc="Model Responding") as bar:
            found = self.model.log_likelihoods(asked, bar.update)
        pairs = [(sign * one.log_likelihood, one.is_greedy) for sign, one in zip(signs, found, strict=True)]
        return [LikelihoodResult(pair) for pair in pairs]

    def _shown(self, to_visual: Callable[[Any], Any], text: str, number: int, task: str, split: str) -> list[Fields]:
        """The pictures of a document and a text, as one message."""
        return user_message(to_visual(self._document(task, split, number)), text)


class ChatModel(_Model):
    """Requests with messages, from a task's `doc_to_messages`, or its pictures and text."""

    is_simple = False

    def _request(self, request: Instance) -> tuple[Callable[[], Sequence[Config]], Config]:
        _, to_messages, given, number, task, split = request.args
        return lambda: to_messages(self._document(task, split, number)), given

    def _rounds(self, request: Instance) -> tuple[Callable[[int, list[str], Any], Round], Config]:
        _, to_messages, given, number, task, split = request.args
        document = self._document(task, split, number)

        def following(round_number: int, said: list[str], kept: Any) -> Round:
            if not round_number:
                return to_messages(document), None
            found = to_messages(document, round_idx=round_number, previous_output=said, previous_round_info=kept)
            messages, is_last, _, kept = found
            return (None if is_last else messages), kept

        return following, given


class SimpleModel(_Model):
    """Requests with pictures and a text, `--force_simple`; tasks of likelihoods have no other."""

    is_simple = True

    def _request(self, request: Instance) -> tuple[Callable[[], Sequence[Config]], Config]:
        context, given, to_visual, number, task, split = request.args
        return functools.partial(self._shown, to_visual, context, number, task, split), given

    def _rounds(self, request: Instance) -> tuple[Callable[[int, list[str], Any], Round], Config]:
        context, given, to_visual, to_text, number, task, split = request.args
        document = self._document(task, split, number)

        def following(round_number: int, said: list[str], kept: Any) -> Round:
            if not round_number:
                return user_message(to_visual(document), context), None
            found = to_text(document, round_idx=round_number, previous_output=said, previous_round_info=kept)
            visuals, text, is_last, _, kept = found
            return (None if is_last else user_message(visuals, text)), kept

        return following, given


def _counts(answers: Sequence[Answered]) -> VisualTokenCounts:
    return VisualTokenCounts(
        input_tokens=sum(answer.prompt_tokens for answer in answers),
        output_tokens=sum(answer.new_tokens for answer in answers),
        visual_tokens=sum(answer.visual_tokens for answer in answers),
    )


def user_message(visuals: Sequence[Any] | None, text: str) -> list[Fields]:
    """One message of a user: its pictures and videos, then a text, as lmms-eval makes it for chat models.

    Raises:
      PromptError: a medium that is not read.
    """
    content = [{"type": _kind(visual), "url": visual} for visual in visuals or ()]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def _kind(visual: Any) -> str:
    """Image, video or audio."""
    if isinstance(visual, Image.Image):
        return "image"
    named = visual if isinstance(visual, str) else ""
    guessed = (mimetypes.guess_type(named)[0] or "").partition("/")[0]
    if guessed in ("image", "video", "audio"):
        return guessed
    raise PromptError(f"expected a Pillow image, or the path of an image or a video, got {visual!r:.80}")


def _conversation(messages: Callable[[], Sequence[Config]]) -> Conversation:
    return _read(messages())


def _read(messages: Sequence[Config]) -> Conversation:
    """Messages of lmms-eval as the processor takes them.

    Raises:
      PromptError: an item of another type, or with a part that is not read.
    """
    found = []
    for number, message in enumerate(messages):
        content = message["content"]
        if not isinstance(content, str):
            content = [_item(item, f"message {number}") for item in content]
        found.append({**message, "content": content})
    return found


def _item(item: Config, where: str) -> Fields:
    """An item with its medium under the key of its kind; other keys are left to `processors.items`."""
    if item["type"] not in ("image", "video") or "url" not in item:
        return dict(item)
    kept = {key: value for key, value in item.items() if key != "url"}
    source = item["url"]
    if isinstance(source, Mapping):
        unread = [key for key, value in source.items() if key not in ("bytes", "path") and value is not None]
        if unread:
            raise PromptError(f"{where}: the key '{unread[0]}' of a {item['type']} is not read; remove it")
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    return {**kept, item["type"]: source}
