"""write_file, write_text, write_bytes: a file that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from pathlib import Path

from netclone.errors import ArchiveError

_TEMPORARY = re.compile(r"\.netclone-(\d+)-[0-9a-f]{16}\.tmp")


def check_place(path: Path) -> None:
    """A file can be put there, as far as can be told before it is made.

    Raises
    ------
    ArchiveError
        If there is no such folder, it is no regular file itself, or the name cannot be one.
    """
    try:
        if not path.parent.is_dir():
            raise ArchiveError(f"cannot write '{path}': there is no folder '{path.parent}'; create it first")
        if path.is_dir():
            raise ArchiveError(f"cannot write '{path}': it is a folder; add a file name, such as clone.safetensors")
        if path.exists() and not path.is_file():
            raise ArchiveError(f"cannot write '{path}': it is no regular file; give the name of one")
        path.parent.joinpath(path.name).lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # too long a name, a loop of links, a null character
        raise ArchiveError(f"cannot write '{path}': {getattr(error, 'strerror', None) or error}") from error


def write_file(path: Path, content: bytes) -> None:
    """As :func:`write_bytes`, for a file that a user asked for.

    Raises
    ------
    ArchiveError
        If it cannot be written.
    """
    check_place(path)
    try:
        write_bytes(path, content)
    except OSError as error:
        raise ArchiveError(f"cannot write '{path}': {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """As :func:`write_bytes`, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Make ``path`` hold the content in one step: a crash leaves the old file or the new one, never a part.

    A file that is there keeps its mode, and a link its place: the file that it points to is written. What processes
    that are gone have left half-made in the folder is removed.
    """
    path = path.resolve() if path.is_symlink() else path
    _clear(path.parent)
    temporary = path.parent / f".netclone-{os.getpid()}-{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            with contextlib.suppress(FileNotFoundError):
                os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _clear(folder: Path) -> None:
    """Remove the temporary files of processes that are gone."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            made = _TEMPORARY.fullmatch(entry.name)
            if made and not _runs(int(made[1])):
                os.unlink(entry.path)


def _runs(process: int) -> bool:
    """Whether there is such a process here."""
    if not os.path.isdir("/proc/self"):
        return True  # not to be told: nothing is removed
    return os.path.isdir(f"/proc/{process}")
