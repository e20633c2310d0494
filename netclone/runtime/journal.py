"""Journal: finished runs, one per line, so that a benchmark that was killed continues where it stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """Records by key, one line of JSON each. The last of a key counts; an incomplete last line is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for line in whole.decode("utf-8", "replace").splitlines():
            try:
                record = json.loads(line)
                self.records[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                continue

    def append(self, record: dict[str, Any]) -> None:
        """Write a record, and flush it to the disk."""
        with self.path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[record["key"]] = record
