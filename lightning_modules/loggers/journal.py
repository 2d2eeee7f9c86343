"""A journal of all rows that a run logs to W&B. A resumed run restores lost rows from it.

W&B writes and sends rows when it finds time, so a kill loses the last ones. The journal is written
before each of them.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_NAME = "logged.jsonl"


@dataclass(frozen=True)
class Row:
    """One row of a W&B run.

    Attributes:
        step: trainer step; None if it was logged without one.
        time: seconds since 1970.
        numbers: metrics by name.
        tables: `columns` and `data` of each table, by name.
        others: names of media, which the journal does not hold.
    """

    step: int | None
    time: float
    numbers: dict[str, float] = field(default_factory=dict)
    tables: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    def restored(self) -> Iterator[str]:
        """Yields the names that a later start can log again from the journal alone."""
        yield from self.numbers
        yield from self.tables


class Journal:
    """The rows of a run in `logged.jsonl` in `folder`; a row's number is its place there."""

    def __init__(self, folder: Path):
        self._path = folder / _NAME

    def read(self) -> Iterator[Row]:
        """Yields every complete row. A row that a kill has cut off was never logged."""
        if self._path.is_file():
            for line in self._path.read_bytes().splitlines():
                try:
                    yield Row(**json.loads(line))
                except (ValueError, TypeError):
                    logger.debug("a kill has torn a row of %s", self._path)

    def append(self, row: Row) -> None:
        """Appends a row; after the call, a kill of this process cannot lose it."""
        with open(self._path, "ab+") as file:
            file.seek(max(0, file.tell() - 1))
            if file.read() not in (b"", b"\n"):
                file.write(b"\n")  # ends a row that a kill has cut off
            file.write(json.dumps(asdict(row)).encode() + b"\n")
