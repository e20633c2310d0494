"""write_file, write_text, write_bytes: a file that appears whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from netclone.errors import ArchiveError


def check_place(path: Path) -> None:
    """A file can be put there, as far as can be told before it is made.

    Raises
    ------
    ArchiveError
        If there is no such folder, or it is a folder itself.
    """
    if not path.parent.is_dir():
        raise ArchiveError(f"cannot write '{path}': there is no folder '{path.parent}'; create it first")
    if path.is_dir():
        raise ArchiveError(f"cannot write '{path}': it is a folder; add a file name, such as clone.safetensors")


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
    """Make ``path`` hold the content in one step: a crash leaves the old file or the new one, never a part."""
    temporary = path.parent / f".netclone-{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
