"""Errors of requests, in the form of OpenAI's interface."""

import re

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.config import ConfigError
from vlm_jax.generation.sampling import GenerationError
from vlm_jax.processors.conversation import ERRORS
from vlm_jax.processors.layout import SequenceTooLong
from vlm_jax.sources import SourceError
from vlm_jax.types import Fields

# Errors whose cause is in the request.
OF_REQUEST = (ConfigError, GenerationError, InfeasibleBudget, SequenceTooLong, SourceError, *ERRORS)
TYPES = {429: "rate_limit_error", 504: "timeout_error"}


class RequestError(Exception):
    """A request that is not answered; the message has the key, what was expected, and the fix.

    Attributes:
      status: of HTTP.
      message: for the client.
      param: key of the request; None where it is none of one key.
      code: a name for programs, as `context_length_exceeded`.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> Fields:
        """The error object."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def of_request(error: Exception) -> RequestError:
    """One of `OF_REQUEST` as an error with status 400."""
    key = re.match(r"request\.(\w+)", str(error))
    param = key[1] if key else "messages" if str(error).startswith("message") else None
    code = "context_length_exceeded" if isinstance(error, SequenceTooLong) else None
    return RequestError(400, str(error), param=param, code=code)
