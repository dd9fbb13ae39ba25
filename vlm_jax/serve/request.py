"""The body of a request for a chat completion: every key is read, without effect by its meaning, or refused by name."""

import dataclasses
import json
import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Any

from vlm_jax.config import ConfigError, parse
from vlm_jax.generation.sampling import Sampling
from vlm_jax.ranges import Count, NonNegative, Positive, PositiveShare, Range, Size
from vlm_jax.types import Fields

# Keys of OpenAI's interface that are not supported -> values that ask for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
# Keys that tell a provider who asks, and change no answer.
ABOUT_CALLER = ("metadata", "prompt_cache_key", "safety_identifier", "user")
MAX_STOPS = 16
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """Keys of `stream_options`.

    Attributes:
      include_usage: a last chunk has the usage.
      include_obfuscation: accepted, without effect.
    """

    include_usage: bool = False
    include_obfuscation: bool = False


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """The keys of a request; a key whose value is null counts as missing.

    Attributes:
      model: name of the served model.
      messages: as `Processor.example` takes them.
      max_tokens, max_completion_tokens: maximum tokens of an answer, by either name.
      temperature, top_p, top_k, repetition_penalty, seed: as in `Sampling`; greedy by default, and with another seed
        for every request without one.
      stop: strings before which an answer ends.
      n: number of answers.
      stream: answers as server-sent events.
      stream_options: of them.
      token_budget, reducer: as `pretrained.budgets.with_budget` takes them; those of the server when None.
    """

    model: str
    messages: tuple[Any, ...]
    max_tokens: Size | None = None
    max_completion_tokens: Size | None = None
    temperature: NonNegative = 0.0
    top_p: PositiveShare = 1.0
    top_k: Count | None = None
    repetition_penalty: Positive | None = None
    seed: Annotated[int, Range(-(2**63), 2**63 - 1)] | None = None
    stop: str | tuple[str, ...] = ()
    n: Count = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    token_budget: Size | None = None
    reducer: str | None = None

    def __post_init__(self):
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ConfigError("request.max_tokens: expected it or max_completion_tokens, got both")
        if self.stream_options is not None and not self.stream:
            raise ConfigError("request.stream_options: expected them with stream=true only")
        if len(self.stops) > MAX_STOPS or "" in self.stops:
            raise ConfigError(f"request.stop: expected at most {MAX_STOPS} strings that are not empty")
        if not self.messages:
            raise ConfigError("request.messages: expected at least one message, got none")
        for number, message in enumerate(self.messages):
            if not isinstance(message, dict):
                raise ConfigError(f"message {number}: expected an object with role and content, got {message!r:.80}")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    @property
    def limit(self) -> int | None:
        """Maximum tokens of an answer; None where the request has none."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    def sampling(self, release: Sampling) -> Sampling:
        """The sampling settings, with those of the release for repeated n-grams, and its repetition penalty by default.

        Raises:
          GenerationError: settings that do not fit one another.
        """
        penalty = release.repetition_penalty if self.repetition_penalty is None else self.repetition_penalty
        seed = secrets.randbelow(2**32) if self.seed is None else self.seed % 2**32
        top_p = None if self.top_p == 1 else self.top_p
        own = {"temperature": self.temperature, "top_k": self.top_k, "top_p": top_p, "repetition_penalty": penalty}
        return dataclasses.replace(release, **own, seed=seed)


def read_request(body: bytes) -> ChatRequest:
    """The request in a body.

    Raises:
      ConfigError: it is not JSON, or a key or a value is not read; the message has the key.
    """
    try:
        given = json.loads(body, parse_constant=_refuse)
        if _SURROGATE.search(body):  # half of a pair is JSON, but no text
            json.dumps(given, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # bytes that are not UTF-8, and a number of too many digits, too
        raise ConfigError(f"request: expected JSON in UTF-8, got {type(error).__name__}: {error}") from None
    if not isinstance(given, dict):
        raise ConfigError(f"request: expected a JSON object, got a value of type {type(given).__name__}")
    own: Fields = {}
    for key, value in given.items():
        if value is None or key in ABOUT_CALLER:
            continue
        if key not in NEUTRAL:
            own[key] = value
        elif not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in NEUTRAL[key]):
            raise ConfigError(f"request.{key}: is not supported by this server; remove it")
    if not isinstance(own.get("messages", []), list):
        raise ConfigError(f"request.messages: expected a list, got a value of type {type(own['messages']).__name__}")
    return parse(ChatRequest, own, "request")


def _refuse(name: str) -> None:
    raise ValueError(f"the constant {name}")
