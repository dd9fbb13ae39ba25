"""Locations of pictures and videos: paths, `file://`, `data:` and web addresses."""

import base64
import binascii
import contextlib
import dataclasses
import functools
import http.client
import os
import socket
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Collection
from typing import Any

WEB = ("http", "https")
MAX_BYTES = 512 * 2**20  # of a download
SECONDS = 60.0  # for a whole download
_CHUNK = 1 << 16


class SourceError(ValueError):
    """A location that cannot be read; the message has it, the reason and the fix."""


@dataclasses.dataclass(frozen=True)
class WebAccess:
    """What may be downloaded.

    Attributes:
      hosts: names of the hosts, without ports, also of redirects; None for any.
      max_bytes: of a download; None for `MAX_BYTES`.
      seconds: for a whole download; None for `SECONDS`.
    """

    hosts: Collection[str] | None = None
    max_bytes: int | None = None
    seconds: float | None = None

    def check(self, url: str) -> None:
        """Raises a `SourceError` for a web address whose host may not be read."""
        try:
            host = urllib.parse.urlsplit(url).hostname or ""
        except ValueError as error:  # as for a bracket without its other
            raise SourceError(f"{shortened(url)}: not a web address: {error}") from None
        if self.hosts is not None and host not in self.hosts:
            hosts = ", ".join(sorted(self.hosts)) or "none"
            raise SourceError(f"{shortened(url)}: the host '{host}' is not allowed; expected one of: {hosts}")


def located(source: str, *, allow_network: bool | WebAccess = False) -> str | bytes:
    """The path of a location, or its bytes where it is no file.

    Args:
      source: a path, in which a leading `~` is the home folder; a path of a bucket, `gs://`; a `file://` or `data:`
        URL; or a web address.
      allow_network: whether a web address is downloaded, up to `MAX_BYTES` bytes and `SECONDS` seconds; or from
        which hosts, and up to which limits.

    Raises:
      SourceError: a malformed URL, another scheme, or a download that is not allowed or failed.
    """
    if source.startswith("data:"):
        return _inline(source)
    if "://" not in source:
        return os.path.expanduser(source)
    scheme = source.partition("://")[0].lower()
    if scheme == "file":
        return _local(source)
    if scheme in WEB:
        if not allow_network:
            raise SourceError(
                f"{shortened(source)} is on the web, which is not read by default; download it, or pass "
                "allow_network=True"
            )
        return _downloaded(source, WebAccess() if allow_network is True else allow_network)
    if scheme not in ("gs", "s3"):
        raise SourceError(
            f"{shortened(source)}: the scheme '{scheme}' is not read; expected a path, file://, data:, gs://, s3:// "
            "or https://"
        )
    return source


def decoded(text: str) -> bytes:
    """The bytes of base64 text, with or without the head of a data URL; white space is ignored.

    Raises:
      SourceError: it is not base64.
    """
    if text.startswith("data:"):
        return _inline(text)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise SourceError(f"{shortened(text)}: not base64: {error}") from None


def shortened(text: str) -> str:
    """A location for messages: long ones, such as data URLs, are cut."""
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


def _inline(source: str) -> bytes:
    head, _, encoded = source.partition(",")
    if not head.endswith(";base64"):
        raise SourceError(f"expected data:…;base64,…, got {shortened(source)}")
    return decoded(encoded)


def _local(source: str) -> str:
    parts = urllib.parse.urlsplit(source)
    if parts.netloc not in ("", "localhost"):
        raise SourceError(
            f"{shortened(source)}: expected file:///… with an absolute path, got the host '{parts.netloc}'"
        )
    literal = source.partition("://")[2].removeprefix(parts.netloc)  # a name may have a ? or # that is not escaped
    return literal if os.path.lexists(literal) else urllib.parse.unquote(literal)


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects to allowed web addresses only, without reading their bodies, which may be of any size."""

    def __init__(self, access: WebAccess):
        self._access = access

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        """The request of a redirect; raises a `SourceError` for another scheme or a host that is not allowed."""
        if urllib.parse.urlsplit(newurl).scheme not in WEB:
            raise SourceError(f"{shortened(req.full_url)}: redirects to {shortened(newurl)}, which is not on the web")
        self._access.check(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def http_error_302(self, req, fp, code, msg, headers):
        """Follows a redirect; a closed answer is read as empty."""
        fp.close()
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class _Connections:
    """Makes connections, and keeps their sockets, so that a read of any part of an answer can be ended."""

    def __init__(self):
        self._sockets: list[socket.socket] = []
        self.ended = False

    def __call__(self, kind: type[http.client.HTTPConnection], host: str, **options: Any) -> http.client.HTTPConnection:
        made = kind(host, **options)
        connect = made.connect

        def keep() -> None:
            connect()
            self._sockets.append(made.sock)
            if self.ended:
                self.end()

        made.connect = keep
        return made

    def end(self) -> None:
        """Ends the connections made so far and later."""
        self.ended = True
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, connections: _Connections):
        super().__init__()
        self._connect: Any = functools.partial(connections, http.client.HTTPConnection)

    def http_open(self, req):
        return self.do_open(self._connect, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, connections: _Connections):
        super().__init__()
        self._connect: Any = functools.partial(connections, http.client.HTTPSConnection)

    def https_open(self, req):
        return self.do_open(self._connect, req, context=ssl.create_default_context())


def _downloaded(source: str, access: WebAccess) -> bytes:
    """Downloads a file within the limits of size and time.

    A thread does it, as a timeout of a socket is that of one step: a slow server may send a byte before each ends.
    """
    access.check(source)
    seconds = SECONDS if access.seconds is None else access.seconds
    connections, found = _Connections(), list[bytes | SourceError]()
    thread = threading.Thread(target=lambda: found.append(_fetched(source, access, connections, seconds)), daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        connections.end()
        raise SourceError(f"{shortened(source)}: not read within {seconds:g} seconds; download it")
    if isinstance(found[0], SourceError):
        raise found[0]
    return found[0]


def _fetched(source: str, access: WebAccess, connections: _Connections, seconds: float) -> bytes | SourceError:
    """The bytes of a file, or why there are none."""
    opener = urllib.request.build_opener(_WebOnly(access), _Http(connections), _Https(connections))
    try:
        request = urllib.request.Request(source, headers={"User-Agent": "vlm_jax"})
        with opener.open(request, timeout=seconds + 1) as answer:  # the limit of the whole comes first
            return _body(answer, source, MAX_BYTES if access.max_bytes is None else access.max_bytes)
    except SourceError as error:
        return error
    except Exception as error:  # an address, a certificate, a header and a chunk each have errors of their own
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        return SourceError(f"{shortened(source)}: cannot be downloaded ({type(error).__name__}: {error})")


def _body(answer: http.client.HTTPResponse, source: str, max_bytes: int) -> bytes:
    parts, size = [], 0
    while part := answer.read1(_CHUNK):
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            raise SourceError(f"{shortened(source)}: more than {max_bytes} bytes; download it and pass a path")
    if answer.length:  # of what was promised; `read1` ends without an error
        raise SourceError(f"{shortened(source)}: ended after {size} of {size + answer.length} bytes; download it")
    return b"".join(parts)
