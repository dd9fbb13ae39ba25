"""Paths as users give them: relative to the working directory, or with `~` for the home folder."""

import os
import stat

from etils import epath

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in a bucket, such as `gs://`."""
    return "://" in os.fspath(path)


def absolute(path: str | os.PathLike[str]) -> str:
    """The absolute form of a local path, with the home folder in place of a leading `~`; a remote one is unchanged.

    Every path that a flag, a key of a config or a function takes goes through this function; shells do not expand the
    `~` of `--flag=~/x`.
    """
    text = os.fspath(path)
    return text if is_remote(text) else os.path.abspath(os.path.expanduser(text))


def regular(path: str | os.PathLike[str], error: type[Exception]) -> epath.Path:
    """A path that is safe to open: remote, or of a regular file.

    Every file that is read by a path of a record, a message or a checkpoint goes through this function: a named pipe
    would wait for a writer, and a device may have no end.

    Raises:
      FileNotFoundError: there is no such file.
      error: a folder, a named pipe, a socket, a device, or a text that no file can have as its path.
    """
    text = os.fspath(path)
    if not is_remote(text):
        try:
            mode = os.stat(text).st_mode
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as cause:
            reason = cause.strerror if isinstance(cause, OSError) else cause
            raise error(f"{_short(text)}: expected the path of a file ({reason})") from cause
        if not stat.S_ISREG(mode):
            raise error(f"{text}: expected a regular file, got {_KINDS.get(stat.S_IFMT(mode), 'another kind')}")
    return epath.Path(text)


def read_text(path: str | os.PathLike[str], error: type[Exception]) -> str:
    """The text of a file in UTF-8.

    Raises:
      FileNotFoundError: there is no such file.
      error: it cannot be read, or is not text in UTF-8; the message names it.
    """
    try:
        return regular(path, error).read_bytes().decode()
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as cause:
        raise error(f"{os.fspath(path)}: cannot be read as UTF-8 text ({cause})") from cause


def _short(text: str) -> str:
    shown = repr(text)[1:-1]
    return shown if len(shown) <= 200 else f"{shown[:100]}… ({len(text)} characters)"
