"""The HTTP endpoints: `/v1/chat/completions`, `/v1/models`, `/health`."""

import asyncio
import concurrent.futures
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from vlm_jax.generation.text import Completion
from vlm_jax.serve.batcher import Batcher, Ended, Event, Job, Piece
from vlm_jax.serve.errors import RequestError
from vlm_jax.serve.request import ChatRequest
from vlm_jax.serve.response import DONE, Answer, event, model_object
from vlm_jax.serve.service import Service

Result = TypeVar("Result")

NUM_READERS = 4  # threads that read and preprocess images
HUGE = 8  # times the limit of a body
GRACE_SECONDS = 5.0  # for the end of a stream after the limit of its request


def make_app(service: Service) -> Starlette:
    """The application of a service, whose queue runs as long as the application."""
    endpoints = _Endpoints(service)

    @contextlib.asynccontextmanager
    async def running(_: Starlette) -> AsyncIterator[None]:
        batcher = service.batcher
        try:
            yield
        finally:
            endpoints.close()
            await asyncio.to_thread(batcher.stop)

    return Starlette(
        routes=[
            Route("/health", endpoints.health),
            Route("/v1/models", endpoints.models),
            Route("/v1/models/{name:path}", endpoints.model),
            Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        ],
        exception_handlers={RequestError: _refused, HTTPException: _not_found, Exception: _failed},
        lifespan=running,
    )


async def _refused(request: Request, error: Any) -> Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body, error.status, headers)


async def _not_found(request: Request, error: Any) -> Response:
    told = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(RequestError(error.status_code, told).body, error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse(RequestError(500, "the server failed; its log has the cause").body, 500)


class _Stream(StreamingResponse):
    """Server-sent events; what they need is held until they end, the client is gone, or it reads them too slowly."""

    def __init__(self, events: AsyncIterator[bytes], held: contextlib.ExitStack, deadline: float):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._held, self._deadline = held, deadline + GRACE_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held, contextlib.suppress(TimeoutError, ClientDisconnect):
            async with asyncio.timeout_at(self._deadline):
                await super().__call__(scope, receive, send)


class _Exchange:
    """One request that is being answered.

    Attributes:
      deadline: in seconds of the event loop.
      job: of the queue, once its messages are read.
    """

    def __init__(self, seconds: float):
        self.loop = asyncio.get_running_loop()
        self.deadline, self.seconds = self.loop.time() + seconds, seconds
        self.job: Job | None = None
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._gone = False

    def put(self, event: Event) -> None:
        """Adds an event, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._events.put_nowait, event)

    def leave(self) -> None:
        """Cancels the job, of a request that ends or whose client is gone."""
        self._gone = True
        if self.job is not None:
            self.job.cancel()

    async def watch(self, request: Request) -> None:
        """Ends the exchange when the client is gone."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.leave()
        self._events.put_nowait(None)

    async def event(self) -> Event:
        """The next event.

        Raises:
          RequestError: the error of the job, or the time is over.
          ClientDisconnect: the client is gone.
        """
        with self.in_time("the request was not answered"):
            async with asyncio.timeout_at(self.deadline):
                found = await self._events.get()
        if found is None:
            raise ClientDisconnect
        if isinstance(found, RequestError):
            raise found
        return found

    async def in_thread(
        self, executor: concurrent.futures.Executor, function: Callable[..., Result], *given: Any
    ) -> Result:
        """The result of a function that takes long, in a thread.

        Raises:
          RequestError: by the function, or the time is over.
          ClientDisconnect: the client is gone.
        """
        with self.in_time("the request was not read"):
            async with asyncio.timeout_at(self.deadline):
                result = await self.loop.run_in_executor(executor, function, *given)
        if self._gone:
            raise ClientDisconnect
        return result

    def submit(self, batcher: Batcher, job: Job) -> None:
        """Adds the job to the queue."""
        self.job = job
        batcher.submit(job)

    @contextlib.contextmanager
    def in_time(self, what: str) -> Iterator[None]:
        """Makes a timeout a RequestError."""
        try:
            yield
        except TimeoutError:
            raise RequestError(504, f"{what} within {self.seconds:g} seconds, the limit of this server") from None


class _Endpoints:
    def __init__(self, service: Service):
        self._service, self._created, self._open = service, int(time.time()), 0
        self._readers = concurrent.futures.ThreadPoolExecutor(NUM_READERS, "reader")

    async def health(self, request: Request) -> Response:
        """Whether the server runs, and how many requests are open."""
        return JSONResponse({"status": "ok", "open_requests": self._open})

    async def models(self, request: Request) -> Response:
        """The list with the served model."""
        return JSONResponse({"object": "list", "data": [model_object(self._service.name, self._created)]})

    async def model(self, request: Request) -> Response:
        """The served model by its name."""
        name = request.path_params["name"]
        if name != self._service.name:
            told = f"this server has the model '{self._service.name}', got '{name}'"
            raise RequestError(404, told, param="model", code="model_not_found")
        return JSONResponse(model_object(name, self._created))

    async def chat(self, request: Request) -> Response:
        """A chat completion, whole or as a stream."""
        settings = self._service.settings
        if self._open >= settings.max_requests:
            raise RequestError(429, f"the server has {self._open} open requests, its limit; wait and ask again")
        exchange, held = _Exchange(settings.request_seconds), contextlib.ExitStack()
        self._open += 1
        held.callback(self._end)
        try:
            with exchange.in_time("the body was not received"):
                async with asyncio.timeout_at(exchange.deadline):
                    body = await self._body(request, settings.max_body_bytes)
            watching = asyncio.create_task(exchange.watch(request))
            held.callback(watching.cancel)
            held.callback(exchange.leave)
            chat = await exchange.in_thread(self._readers, self._service.read, body)
            job = await exchange.in_thread(self._readers, self._service.job, chat, exchange.put)
            exchange.submit(self._service.batcher, job)
            if chat.stream:
                first = await exchange.event()  # or an error, with its status
                return _Stream(self._events(chat, job, exchange, first), held.pop_all(), exchange.deadline)
            return await self._whole(job, exchange)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        finally:
            held.close()

    def close(self) -> None:
        """Ends the threads that read messages, after the ones they read."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _end(self) -> None:
        self._open -= 1

    async def _body(self, request: Request, limit: int) -> bytes:
        """The body; one that is too long is read to its end, unless it is huge, or clients would fail to send it."""
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size <= limit:
                parts.append(part)
            elif size > HUGE * limit:
                break
        if size > limit:
            raise RequestError(413, f"the body is over the limit of {limit} bytes; reduce its images")
        return b"".join(parts)

    async def _whole(self, job: Job, exchange: _Exchange) -> Response:
        done = dict[int, Completion]()
        while len(done) < job.num_choices:
            found = await exchange.event()
            if isinstance(found, Ended):
                done[found.choice] = found.completion
        completions = [done[choice] for choice in range(job.num_choices)]
        return JSONResponse(Answer(self._service.name).whole(job.example, completions))

    async def _events(self, chat: ChatRequest, job: Job, exchange: _Exchange, found: Event) -> AsyncIterator[bytes]:
        done, answer = dict[int, Completion](), Answer(self._service.name)
        for choice in range(job.num_choices):
            yield answer.piece(choice, {"role": "assistant", "content": ""})
        try:
            while True:
                if isinstance(found, Piece):
                    yield answer.piece(found.choice, {"content": found.text})
                elif isinstance(found, Ended):
                    done[found.choice] = found.completion
                    yield answer.piece(found.choice, {}, found.completion)
                if len(done) == job.num_choices:
                    break
                found = await exchange.event()
        except ClientDisconnect:
            return
        except RequestError as error:  # the status has been sent
            yield event(error.body)
            return
        if chat.stream_options is not None and chat.stream_options.include_usage:
            yield answer.last(job.example, [done[choice] for choice in range(job.num_choices)])
        yield DONE
