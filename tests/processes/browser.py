"""A headless Chromium: that of `CHROMIUM`, else the one that `make processes` installs from the npm registry."""

import contextlib
import io
import os
import pathlib
import sys
import tarfile

import brotli
from playwright.sync_api import sync_playwright

PACKED = pathlib.Path(sys.prefix) / "browser" / "node_modules" / "@sparticuz" / "chromium" / "bin"
# Root has no sandbox, and nothing outside of this machine is asked for.
OPTIONS = (
    *("--no-sandbox", "--no-zygote", "--disable-gpu", "--disable-quic", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run", "--font-render-hinting=none"),
)
FONTS = '<?xml version="1.0"?><fontconfig><dir>{}</dir><cachedir>{}</cachedir></fontconfig>'


def unpacked(folder: pathlib.Path) -> tuple[str, dict[str, str]]:
    """The program and its environment; what is packed is unpacked to a folder."""
    if program := os.environ.get("CHROMIUM"):
        return program, dict(os.environ)
    if not PACKED.exists():
        raise FileNotFoundError(f"{PACKED}: no Chromium here; run make processes, or set CHROMIUM to the path of one")
    program = folder / "chromium"
    program.write_bytes(brotli.decompress((PACKED / "chromium.br").read_bytes()))
    program.chmod(0o755)
    for name in ("al2023", "fonts"):
        content = io.BytesIO(brotli.decompress((PACKED / f"{name}.tar.br").read_bytes()))
        with tarfile.open(fileobj=content) as packed:
            packed.extractall(folder / name, filter="data")
    (folder / "fonts.conf").write_text(FONTS.format(folder / "fonts", folder / "font-cache"))
    libraries, fonts = str(folder / "al2023" / "lib"), str(folder / "fonts.conf")
    return str(program), {**os.environ, "LD_LIBRARY_PATH": libraries, "FONTCONFIG_FILE": fonts}


@contextlib.contextmanager
def started(folder: pathlib.Path):
    """The browser, of playwright."""
    program, env = unpacked(folder)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(OPTIONS), env=env)
        try:
            yield browser
        finally:
            browser.close()
