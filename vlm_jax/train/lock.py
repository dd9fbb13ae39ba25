"""A lock on a folder, which ends with the process that has it."""

import contextlib
import errno
import fcntl
import os
import secrets
import socket
from collections.abc import Callable, Iterator

from etils import epath

from vlm_jax.paths import is_remote
from vlm_jax.train.workdir import WorkdirError

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of file systems that cannot lock


class WorkdirInUse(RuntimeError):
    """Another process runs in the workdir; the message names it."""


@contextlib.contextmanager
def lock(path: epath.Path) -> Iterator[Callable[[], None]]:
    """Holds a lock file, in the folder that it is for, inside the `with`.

    Local files are locked by `flock`, which ends with the process, however it ends. In a bucket, or where the file
    system does not lock, the newest process has the folder.

    Yields:
      A function that raises WorkdirInUse if another process has taken the folder, where there are no locks.

    Raises:
      WorkdirInUse: another process holds it.
      WorkdirError: the folder cannot be written.
    """
    if is_remote(path):
        with _newest(path) as confirm:
            yield confirm
        return
    handle = _locked(path)
    if handle is None:
        with _newest(path) as confirm:
            yield confirm
        return
    try:
        os.truncate(handle, 0)
        os.pwrite(handle, f"{_name()}\n".encode(), 0)
        yield lambda: None
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _locked(path: epath.Path) -> int | None:
    """A handle of the locked file; None where files cannot be locked."""
    while True:
        try:
            handle = os.open(os.fspath(path), os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise unwritable(path.parent, error) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(handle, 200, 0).decode(errors="replace").strip()
            os.close(handle)
            if error.errno in NO_LOCKS:
                return None
            raise WorkdirInUse(
                f"{path.parent} is in use by {owner or 'another process'}; wait until it ends, stop it, or use another "
                "--workdir"
            ) from None
        if path.exists() and os.path.samestat(os.fstat(handle), os.stat(path)):
            return handle
        os.close(handle)  # the owner before removed this file between our two calls


@contextlib.contextmanager
def _newest(path: epath.Path) -> Iterator[Callable[[], None]]:
    mine = f"{_name()}, {secrets.token_hex(8)}\n"
    path.write_text(mine)

    def confirm() -> None:
        found = path.read_text().strip() if path.exists() else "another process, which has ended"
        if found != mine.strip():
            raise WorkdirInUse(f"{path.parent} was taken over by {found}; this run ends and saves nothing more")

    try:
        yield confirm
    finally:
        if path.exists() and path.read_text() == mine:
            path.unlink()


def unwritable(folder: epath.Path, error: OSError) -> WorkdirError:
    """The error of a folder that no file can be made in."""
    return WorkdirError(
        f"{folder}: cannot be written ({error.strerror}); fix the permissions, or use another --workdir"
    )


def _name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
