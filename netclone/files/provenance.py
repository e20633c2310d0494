"""Provenance: the day and the person that a file names, and the log of what was done to a grafted network's file."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone

import netclone
from netclone.errors import ArchiveError, ArgumentError
from netclone.files.graphdata import check_keys, check_list, shown
from netclone.runtime.text import is_plain_text

MOST_EVENTS = 10_000
_ACTIONS = ("inject", "remove")
_DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_SHA256 = re.compile("[0-9a-f]{64}")
_ABSOLUTE = re.compile(r"\s*(?:/|\\\\|[a-z]:[\\/]|file:/)", re.IGNORECASE)
MOST_LETTERS = 200


@dataclass(frozen=True)
class Event:
    """Something that was done to a grafted network's file: a clone was injected or removed.

    ``date`` is the day. ``file`` and ``sha256`` are the name and the digest of the clone's own file, as ``sha256sum``
    prints it. ``by`` is who did it, if they said so, and ``version`` that of netclone.
    """

    action: str
    clone: str
    date: str
    file: str
    sha256: str
    by: str
    version: str


def today() -> str:
    """The day, in UTC. With ``SOURCE_DATE_EPOCH`` in the environment it is that day, so that a file comes out the same.

    Raises
    ------
    ArgumentError
        If that is no number of seconds.

    Reference: https://reproducible-builds.org/specs/source-date-epoch
    """
    said = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        moment = datetime.now(timezone.utc) if not said else datetime.fromtimestamp(int(said), timezone.utc)
    except (ValueError, OverflowError, OSError) as error:
        raise ArgumentError(
            f"SOURCE_DATE_EPOCH: the environment says {said!r}, expected seconds since 1970; unset it"
        ) from error
    return f"{moment:%Y-%m-%d}"


def checked_by(by: str | None) -> str:
    """Who did something, as they said it; empty if they did not. No name is looked up: a file must not give one away.

    Raises
    ------
    ArgumentError
        If it cannot stand in a file.

    Examples
    --------
    >>> checked_by("Ada Lovelace"), checked_by(None)
    ('Ada Lovelace', '')
    """
    text = (by or "").strip()
    if not is_plain_text(text) or len(text) > MOST_LETTERS or is_absolute_path(text):
        raise ArgumentError(f"by: got {shown(by)}, expected a name in one line of at most {MOST_LETTERS} letters")
    return text


def is_absolute_path(text: str) -> bool:
    """Whether text is a path from the root of some machine, which no file of netclone may hold.

    Examples
    --------
    >>> is_absolute_path("C:\\\\birds"), is_absolute_path("birds/herons")
    (True, False)
    """
    return _ABSOLUTE.match(text) is not None


def event(action: str, clone: str, digest: str, *, file: str = "", by: str = "") -> Event:
    """What is done today to a clone whose file has this digest."""
    return Event(action, clone, today(), file, digest, by, netclone.__version__)


@dataclass(frozen=True)
class History:
    """What a grafted network's file tells of itself: its log, and the digests of the clones that it held, by name."""

    log: tuple[Event, ...] = ()
    held: Mapping[str, str] = field(default_factory=dict)

    def until(
        self, archives: Mapping[str, bytes], *, files: Mapping[str, str] | None = None, by: str = ""
    ) -> tuple[Event, ...]:
        """The log, continued until a file holds the clones with these archives, by name.

        A clone that has gone was removed today, one that has come was injected today, and one whose archive is another
        was both. ``files`` are the names of the files that clones came from, and ``by`` is who did it.

        Examples
        --------
        >>> first = History().until({"herons": b"1"}, files={"herons": "herons.safetensors"}, by="Ada")
        >>> then = History(first, {"herons": sha256(b"1")}).until({"ibises": b"2"})
        >>> [(one.action, one.clone, one.file, one.by) for one in then]
        [('inject', 'herons', 'herons.safetensors', 'Ada'), ('remove', 'herons', '', ''), ('inject', 'ibises', '', '')]
        """
        now = {name: sha256(archive) for name, archive in archives.items()}
        gone = [event("remove", name, was, by=by) for name, was in self.held.items() if now.get(name) != was]
        come = [
            event("inject", name, is_now, file=(files or {}).get(name, ""), by=by)
            for name, is_now in now.items()
            if self.held.get(name) != is_now
        ]
        return *self.log, *gone, *come


def sha256(archive: bytes) -> str:
    """The digest of a clone's file, as ``sha256sum`` prints it."""
    return hashlib.sha256(archive).hexdigest()


def log_to_data(log: Sequence[Event]) -> list[dict[str, object]]:
    """A log as JSON holds it; :func:`log_from_data` reads it."""
    return [asdict(one) for one in log[-MOST_EVENTS:]]


def log_from_data(value: object) -> tuple[Event, ...]:
    """A log from what a file says, checked.

    Raises
    ------
    ArchiveError
        If it is not as :func:`log_to_data` makes it.

    Examples
    --------
    >>> one = event("inject", "herons", sha256(b""))
    >>> log_from_data(log_to_data([one])) == (one,)
    True
    """
    items = check_list(value, "log")
    if len(items) > MOST_EVENTS:
        raise ArchiveError(f"log: {len(items)} entries, expected at most {MOST_EVENTS}")
    return tuple(_event(item) for item in items)


def _event(value: object) -> Event:
    data = check_keys(value, [one.name for one in fields(Event)], "an entry of the log")
    for name, item in data.items():
        if not is_plain_text(item) or len(item) > MOST_LETTERS or is_absolute_path(item):
            raise ArchiveError(f"log: '{name}' has an invalid value, {shown(item)}")
    words = {name: str(item) for name, item in data.items()}
    if words["action"] not in _ACTIONS or not _DAY.fullmatch(words["date"]) or not _SHA256.fullmatch(words["sha256"]):
        raise ArchiveError(f"log: got {shown(value)}, expected inject or remove, a day and a digest")
    return Event(**words)
