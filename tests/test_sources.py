"""Downloads of pictures from a local server: limits of size and time, redirects, and answers that are not pictures."""

import base64
import contextlib
import http.server
import threading

import numpy as np
import pytest
from PIL import Image

from vlm_jax import sources
from vlm_jax.processors.image import CorruptImage, to_picture
from vlm_jax.sources import SourceError, WebAccess, located

from .advice import tried

PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC")
LIMIT = 5000  # bytes
SECONDS = 0.4


class Site(http.server.BaseHTTPRequestHandler):
    """Pages by path; `asked` has the paths of all requests."""

    asked: list[str]
    over: threading.Event

    def do_GET(self):
        self.asked.append(self.path)
        getattr(self, self.path.split("/")[1].partition(".")[0])()

    def send(self, body, kind="image/png", length=None, status=200, **headers):
        self.send_response(status)
        headers |= {"Content-Type": kind, "Content-Length": str(len(body) if length is None else length)}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def picture(self):
        self.send(PIXEL)

    def unlabelled(self):
        self.send(PIXEL, kind="text/html")

    def page(self):
        self.send(b"<html>sign in</html>", kind="image/png")

    def large(self):
        self.send(b"x" * (LIMIT + 1))

    def endless(self):
        self.send_response(200)
        self.end_headers()
        self.fill(b"x" * 1000)

    def short(self):
        self.send(PIXEL[:40], length=len(PIXEL))

    def moved(self):
        self.send(b"", status=302, Location="/picture.png")

    def heavy(self):
        """A redirect with an endless body."""
        self.send_response(302)
        self.send_header("Location", "/picture.png")
        self.end_headers()
        self.fill(b"x" * 1000)

    def elsewhere(self):
        """The same picture under another name of the host."""
        self.send(b"", status=302, Location=f"http://localhost:{self.server.server_port}/picture.png")

    def circle(self):
        self.send(b"", status=302, Location="/circle")

    def local(self):
        self.send(b"", status=302, Location="file:///etc/passwd")

    def other(self):
        self.send(b"", status=302, Location="ftp://127.0.0.1/a.png")

    def missing(self):
        self.send(b"not here", status=404)

    def broken(self):
        self.send(b"", status=503)

    def slow(self):
        self.send_response(200)
        self.end_headers()
        self.drip(b"x")

    def chunked(self, begin=b""):
        """A chunk whose size never ends."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(begin)
        self.drip(b"0" if not begin else b"a: b\r\n")

    def trailer(self):
        """A whole picture, then trailers without an end."""
        self.chunked(b"%x\r\n%s\r\n0\r\n" % (len(PIXEL), PIXEL))

    def silent(self):
        self.over.wait(10)

    def head(self):
        """A head that never ends, byte by byte."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        self.drip(b"x")

    def fill(self, part):
        """Writes as fast as it is read."""
        while not self.over.is_set():
            self.wfile.write(part)

    def drip(self, part):
        """Writes slowly, for ever."""
        while not self.over.wait(0.05):
            self.wfile.write(part)

    def handle(self):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the reader has had enough
            super().handle()

    def log_message(self, format, *args):
        """Nothing."""


@pytest.fixture(scope="module")
def site():
    Site.asked, Site.over = [], threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    yield f"http://127.0.0.1:{server.server_port}"
    Site.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    monkeypatch.setattr(sources, "MAX_BYTES", LIMIT)


def test_the_web_is_not_asked_unless_it_is_allowed(site):
    before = len(Site.asked)
    with pytest.raises(
        SourceError, match=tried("is on the web, which is not read by default; download it, or pass allow_network=True")
    ):
        located(f"{site}/picture.png")
    with pytest.raises(CorruptImage, match="is on the web"):
        to_picture(f"{site}/picture.png")
    assert len(Site.asked) == before
    assert located(f"{site}/picture.png", allow_network=True) == PIXEL


@pytest.mark.parametrize("path", ["picture.png", "unlabelled", "moved", "heavy"])
def test_a_picture_is_read_by_its_bytes_and_through_a_redirect(site, path):
    """The kind that a server states is not read: many state a wrong one."""
    assert located(f"{site}/{path}", allow_network=True) == PIXEL
    found = to_picture(f"{site}/{path}", allow_network=True)
    assert isinstance(found, Image.Image)
    np.testing.assert_array_equal(np.asarray(found), [[[255, 0, 0]]])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("large", f"more than {LIMIT} bytes; download it"),
        ("endless", f"more than {LIMIT} bytes"),
        ("short", f"ended after 40 of {len(PIXEL)} bytes"),
        ("circle", "cannot be downloaded .*redirect"),
        ("local", "cannot be downloaded .*'file:///etc/passwd' is not allowed"),
        ("other", "redirects to ftp://127.0.0.1/a.png, which is not on the web"),
        ("missing", "cannot be downloaded .*HTTPError: HTTP Error 404"),
        ("broken", "cannot be downloaded .*HTTPError: HTTP Error 503"),
    ],
)
def test_what_is_no_whole_file_is_named(site, path, message):
    with pytest.raises(SourceError, match=rf"{site}/{path}: {message}"):
        located(f"{site}/{path}", allow_network=True)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("large", tried("more than {} bytes; download it and pass a path")),
        ("short", tried("ended after {40} of {} bytes; download it")),
        ("slow", tried("not read within {} seconds; download it")),
    ],
)
def test_what_is_downloaded_is_read_by_its_path(monkeypatch, site, path, message, tmp_path):
    monkeypatch.setattr(sources, "SECONDS", SECONDS)
    with pytest.raises(CorruptImage, match=message):
        to_picture(f"{site}/{path}", allow_network=True)
    (tmp_path / "a.png").write_bytes(PIXEL)
    np.testing.assert_array_equal(np.asarray(to_picture(str(tmp_path / "a.png"))), [[[255, 0, 0]]])


@pytest.mark.parametrize("path", ["slow", "silent", "head", "chunked", "trailer"])
def test_a_server_that_takes_its_time_is_left(monkeypatch, site, path):
    monkeypatch.setattr(sources, "SECONDS", SECONDS)
    running = set(threading.enumerate())
    with pytest.raises(SourceError, match=rf"/{path}: not read within {SECONDS} seconds"):
        located(f"{site}/{path}", allow_network=True)
    left = [one for one in set(threading.enumerate()) - running if "process_request" not in one.name]
    for one in left:  # its connection is ended
        one.join(10)
        assert not one.is_alive()


def test_a_page_in_place_of_a_picture_is_no_picture(site):
    with pytest.raises(CorruptImage, match="unknown image format"):
        to_picture(f"{site}/page", allow_network=True)


def test_an_address_without_a_server_is_named():
    with pytest.raises(SourceError, match=r"http://127\.0\.0\.1:1/a\.png: cannot be downloaded \(URLError"):
        located("http://127.0.0.1:1/a.png", allow_network=True)


def test_only_hosts_that_are_allowed_are_asked(site):
    """The host of the address and that of a redirect; a name before @ is no host."""
    access = WebAccess(hosts=["127.0.0.1"])
    assert located(f"{site}/moved", allow_network=access) == PIXEL
    before = len(Site.asked)
    for address, host in (
        (site.replace("127.0.0.1", "localhost"), "localhost"),
        (site.replace("127.0.0.1", "127.0.0.1@[::1]"), "::1"),
        ("http:///picture.png", ""),
    ):
        with pytest.raises(SourceError, match=f"the host '{host}' is not allowed; expected one of: 127.0.0.1"):
            located(address, allow_network=access)
    with pytest.raises(SourceError, match="not a web address"):
        located("http://[::1/a.png", allow_network=access)
    assert len(Site.asked) == before
    with pytest.raises(SourceError, match=r"/picture\.png: the host 'localhost' is not allowed"):
        located(f"{site}/elsewhere", allow_network=access)
    assert Site.asked[before:] == ["/elsewhere"]
    assert located(f"{site}/elsewhere", allow_network=WebAccess()) == PIXEL


def test_limits_of_an_access_go_before_those_of_all(site):
    with pytest.raises(SourceError, match=f"more than {len(PIXEL) - 1} bytes"):
        located(f"{site}/picture.png", allow_network=WebAccess(max_bytes=len(PIXEL) - 1))
    assert located(f"{site}/picture.png", allow_network=WebAccess(max_bytes=len(PIXEL))) == PIXEL
    assert len(located(f"{site}/large", allow_network=WebAccess(max_bytes=LIMIT + 1))) == LIMIT + 1
    with pytest.raises(SourceError, match=r"/silent: not read within 0\.3 seconds"):
        located(f"{site}/silent", allow_network=WebAccess(seconds=0.3))
