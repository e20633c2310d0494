"""check_place, write_file, write_text: write a file completely or not at all.

Everything that netclone writes for a user goes through here. The content goes to a temporary file in the same folder,
which then replaces the old file in one step.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from netclone.errors import ArchiveError

_TEMPORARY = re.compile(r"\.netclone-([0-9a-f]{8})-([0-9]+)-[0-9a-f]{16}\.tmp")
_KINDS = (
    (stat.S_ISDIR, "a folder: add a file name, such as clone.safetensors"),
    (stat.S_ISLNK, "a link that leads back to itself: remove it"),
    (stat.S_ISFIFO, "a pipe, and not a file: choose another path"),
    (stat.S_ISSOCK, "a socket, and not a file: choose another path"),
    (stat.S_ISCHR, "a device, and not a file: choose another path"),
    (stat.S_ISBLK, "a device, and not a file: choose another path"),
)
_WAYS_OUT = {
    errno.ENOSPC: "; make room, or write elsewhere",
    errno.EDQUOT: "; make room, or write elsewhere",
    errno.EFBIG: "; make room, or write elsewhere",
    errno.EROFS: "; write elsewhere",
    errno.EACCES: "; change its permissions, or write elsewhere",
    errno.EPERM: "; change its permissions, or write elsewhere",
    errno.ENAMETOOLONG: "; choose a shorter name",
}
_OF_FILES = {
    *_WAYS_OUT,
    *(errno.EIO, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY),
    *(errno.ELOOP, errno.EMFILE, errno.ENFILE, errno.EBUSY, errno.ESTALE),
}


def check_place(path: Path) -> None:
    """Raise if a file cannot be written there, as far as that can be told beforehand.

    Raises
    ------
    ArchiveError
        If there is no such folder, it is read-only, the name is not a file's, or anything but a regular file is there.
    """
    with _typed(path):
        _place(path)


def write_file(path: Path, content: bytes) -> None:
    """Write a file in one step: a crash leaves the old file or the new one, never a part.

    An existing file keeps its mode. If the path is a link, the file that it leads to is written. Temporary files that
    dead processes left in the folder are removed.

    Raises
    ------
    ArchiveError
        If it cannot be written; the old file is then unchanged.
    """
    with _typed(path):
        place, old = _place(path)
        _clear(place.parent)
        temporary = place.parent / f".netclone-{_host()}-{os.getpid()}-{secrets.token_hex(8)}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        try:
            with open(os.open(temporary, flags, 0o666 if old is None else 0o600), "wb") as file:
                if old is not None:
                    _set_owner_and_mode(temporary, old)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, place)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """As :func:`write_file`, in UTF-8."""
    write_file(path, text.encode("utf-8"))


def make_folder(path: Path) -> None:
    """Create a folder, and those above it, if it does not exist.

    Raises
    ------
    ArchiveError
        If it cannot be created.
    """
    with _typed(path):
        path.mkdir(parents=True, exist_ok=True)


def is_of_files(error: BaseException) -> bool:
    """Whether an error comes from the local file system rather than the network.

    Examples
    --------
    >>> is_of_files(OSError(errno.ENOSPC, "No space left on device")), is_of_files(ConnectionResetError(104, "reset"))
    (True, False)
    """
    return isinstance(error, OSError) and error.errno in _OF_FILES


def reason(error: OSError) -> str:
    """What the file system says, and what to do about it, if that is known."""
    return f"{error.strerror or error}{_WAYS_OUT.get(error.errno or 0, '')}"


@contextmanager
def _typed(path: Path) -> Iterator[None]:
    """Raise errors of the file system as ArchiveError."""
    try:
        yield
    except OSError as error:
        raise ArchiveError(f"cannot write '{path}': {reason(error)}") from error
    except ValueError as error:  # a NUL in the name, or a lone surrogate
        if isinstance(error, ArchiveError):
            raise
        raise ArchiveError(f"cannot write {str(path)!r}: no file can have this name ({error})") from error


def _place(path: Path) -> tuple[Path, os.stat_result | None]:
    """The file to write after following links, and the status of the existing one."""
    place = Path(os.path.realpath(path))
    try:
        old = os.lstat(place)
    except (FileNotFoundError, NotADirectoryError):
        old = None
    if old is not None and not stat.S_ISREG(old.st_mode):
        kind = next((words for is_kind, words in _KINDS if is_kind(old.st_mode)), "no file: choose another path")
        raise ArchiveError(f"cannot write '{path}': it is {kind}")
    if not place.parent.is_dir():
        folder = place.parent if path.is_symlink() else path.parent
        raise ArchiveError(f"cannot write '{path}': there is no folder '{folder}'; create it first")
    if (old is not None and not os.access(place, os.W_OK)) or not os.access(place.parent, os.W_OK):
        what = "its folder" if old is None or os.access(place, os.W_OK) else "it"
        raise ArchiveError(f"cannot write '{path}': {what} is read-only; change its permissions, or write elsewhere")
    return place, old


def _set_owner_and_mode(path: Path, old: os.stat_result) -> None:
    new = os.stat(path)
    if hasattr(os, "chown") and (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        with suppress(PermissionError):  # without the right to give files away, the file stays the user's own
            os.chown(path, old.st_uid, old.st_gid)
    os.chmod(path, stat.S_IMODE(old.st_mode))


def _clear(folder: Path) -> None:
    """Remove temporary files of processes that are gone from this machine."""
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if entry.name.startswith(".netclone-")]
    for entry in found:
        named = _TEMPORARY.fullmatch(entry.name)
        if named and named[1] == _host() and not _is_alive(int(named[2])):
            with suppress(OSError):
                os.unlink(entry.path)


def _host() -> str:
    """A name for this machine, since other machines may write into a shared folder."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_alive(process: int) -> bool:
    if os.name != "posix":  # on Windows signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
