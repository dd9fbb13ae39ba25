"""A served release: requests to jobs, with the token budget that each asks for."""

import dataclasses
import functools
import threading
from collections.abc import Callable

from jax.sharding import Mesh

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.config import ConfigError, check_fields
from vlm_jax.pretrained.budgets import with_budget
from vlm_jax.pretrained.pretrained import Pretrained
from vlm_jax.processors.layout import SequenceTooLong
from vlm_jax.ranges import Bytes, Count, NonNegative, Positive, Size
from vlm_jax.serve.batcher import Batcher, Event, Job
from vlm_jax.serve.errors import OF_REQUEST, RequestError, of_request
from vlm_jax.serve.media import with_bytes
from vlm_jax.serve.request import ChatRequest, read_request
from vlm_jax.sharding.rules import mesh_of
from vlm_jax.sources import WebAccess
from vlm_jax.system import System

ANY_HOST = "*"


@dataclasses.dataclass(frozen=True)
class ServeSettings:
    """Settings of a server; flags of `cli.serve` have the same names.

    Attributes:
      token_budget, reducer: for requests without their own; as released when None.
      max_new_tokens: tokens of an answer of a request without `max_tokens`.
      max_length: maximum tokens of a prompt with its answer, visual tokens included.
      max_batch: maximum answers that are generated together.
      num_batches: number of batches that are generated at once; 1 on several devices, else 2, when None.
      batch_wait: seconds that a request waits for others in its batch.
      chunk: maximum tokens between two pieces of a streamed answer; a cancelled request leaves after at most as many.
      max_requests: maximum open requests.
      max_body_bytes: maximum size of a request's body.
      max_media: maximum images and videos of a request.
      max_pixels: maximum pixels of an image.
      image_hosts: hosts from which images and videos may be downloaded, `*` for any.
      download_seconds: for a download.
      request_seconds: from a request's arrival to the end of its answer.
      max_budgets: number of different pairs of a token budget and a reducer that requests may use.
      enable_thinking: whether the model may think first, where its chat template has this variable; the template's
        default when None.

    Raises:
      ConfigError: a value outside its range.
    """

    token_budget: Size | None = None
    reducer: str | None = None
    max_new_tokens: Size = 512
    max_length: Size = 16384
    max_batch: Size = 8
    num_batches: Count | None = None
    batch_wait: NonNegative = 0.01
    chunk: Count = 8
    max_requests: Count = 128
    max_body_bytes: Bytes = 32 * 2**20
    max_media: Count = 16
    max_pixels: Count = 50_000_000
    image_hosts: tuple[str, ...] = ()
    download_seconds: Positive = 10.0
    request_seconds: Positive = 600.0
    max_budgets: Count = 8
    enable_thinking: bool | None = None

    def __post_init__(self):
        check_fields(self, "--")

    def batches_on(self, mesh: Mesh | None) -> int:
        """Number of batches that are generated at once on the devices of a mesh, or on one where it is None.

        Raises:
          ConfigError: several on several devices, which would run their programs in different orders and wait for one
            another.
        """
        devices = 1 if mesh is None else mesh.size
        if devices > 1 and (self.num_batches or 1) > 1:
            raise ConfigError(
                f"--num_batches: expected 1 on the {devices} devices of --mesh, got {self.num_batches}; set "
                "--max_batch for more answers at once"
            )
        return self.num_batches or (1 if devices > 1 else 2)

    @property
    def access(self) -> WebAccess:
        """What may be downloaded for requests."""
        hosts = None if ANY_HOST in self.image_hosts else tuple(host.lower() for host in self.image_hosts)
        return WebAccess(hosts, self.max_body_bytes, self.download_seconds)


class Service:
    """A model with its queue.

    Attributes:
      name: of the model, for requests.
      settings: of the server.
    """

    def __init__(self, name: str, model: Pretrained, settings: ServeSettings, *, cache_dtype: str | None = None):
        """Prepares the parameters, and the system with the budget of the server.

        Raises:
          UnsupportedError, ChatTemplateError, TokenizerError: the release has no conversations, or lacks a file, or its
            template does not read `enable_thinking`.
          InfeasibleBudget, ConfigError: the budget of the settings does not suit the model; or as of
            `ServeSettings.batches_on`.
        """
        self.name, self.settings = name, settings
        self._num_batches = settings.batches_on(mesh_of(model.params))
        self._model, self._cache_dtype = model, cache_dtype
        self._systems: dict[tuple[int | None, str | None], System] = {}
        self._lock = threading.Lock()
        self.system(None, None)

    @functools.cached_property
    def batcher(self) -> Batcher:
        """The queue; its threads run from the first use until `stop`."""
        settings = self.settings
        return Batcher(
            self._model.system.prepared(self._model.params),
            max_rows=settings.max_batch,
            wait_seconds=settings.batch_wait,
            chunk=settings.chunk,
            num_batches=self._num_batches,
            cache_dtype=self._cache_dtype,
        )

    def system(self, token_budget: int | None, reducer: str | None) -> System:
        """The system with a token budget and a reducer; those of the server where they are None.

        Raises:
          InfeasibleBudget, ConfigError: the budget does not suit the model.
          RequestError: the server has as many others as it may.
        """
        settings = self.settings
        kind = reducer or settings.reducer
        key = (token_budget or settings.token_budget, None if kind == "none" else kind)
        with self._lock:
            if key not in self._systems:
                if len(self._systems) >= settings.max_budgets:
                    known = ", ".join(f"{tokens} with reducer {kind}" for tokens, kind in self._systems)
                    told = f"request.token_budget: the server has all its {len(self._systems)} budgets; use one of them"
                    raise RequestError(400, f"{told}: {known}", param="token_budget")
                own = token_budget is not None or reducer is not None
                self._systems[key] = self._made(*key, "request" if own else "config")
            return self._systems[key]

    def _made(self, tokens: int | None, reducer: str | None, path: str) -> System:
        system = self._model.system.thinking(self.settings.enable_thinking)
        if tokens is not None or reducer is not None:
            try:
                system = with_budget(system, tokens, reducer=reducer, path=path)
            except InfeasibleBudget as error:  # of the solver, which knows configs alone
                raise InfeasibleBudget(str(error).replace("config.token_budget", f"{path}.token_budget", 1)) from error
        processor = dataclasses.replace(system.processor, max_pixels=self.settings.max_pixels)
        made = dataclasses.replace(system, make_processor=lambda: processor)
        made.processor  # noqa: B018 (before the first request)
        return made

    def read(self, body: bytes) -> ChatRequest:
        """The request in a body.

        Raises:
          RequestError: it cannot be read, or is for another model.
        """
        try:
            request = read_request(body)
        except OF_REQUEST as error:
            raise of_request(error) from error
        if request.model != self.name:
            told = f"request.model: this server has the model '{self.name}', got '{request.model}'"
            raise RequestError(404, told, param="model", code="model_not_found")
        if request.n > self.settings.max_batch:
            told = f"request.n: expected at most {self.settings.max_batch}, got {request.n}"
            raise RequestError(400, told, param="n")
        return request

    def job(self, request: ChatRequest, on_event: Callable[[Event], None]) -> Job:
        """The job of a request; reads, downloads and preprocesses its images.

        Raises:
          RequestError: its messages, images or settings are not accepted.
        """
        settings = self.settings
        try:
            sampling = request.sampling(self._model.system.sampling)
            system = self.system(request.token_budget, request.reducer)
            messages = with_bytes(request.messages, settings.access, settings.max_media)
            example = system.processor.example(messages, name="messages")
            limit = request.limit
            if limit is None:
                limit = max(1, min(settings.max_new_tokens, settings.max_length - example.load.length))
            if example.load.length + limit > settings.max_length:
                raise SequenceTooLong(
                    f"messages: a prompt of {example.load.length} tokens and {limit} new tokens are over the limit of "
                    f"{settings.max_length}; shorten the messages, or reduce max_tokens"
                )
        except OF_REQUEST as error:
            raise of_request(error) from error
        return Job(system, example, sampling, request.stops, limit, request.n, on_event)
