"""Paths as users give them: relative to the working directory, or with `~` for the home folder."""

import os


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
