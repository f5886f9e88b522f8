"""What parts say through the logger "prunus" while they work, collected for who reports it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collecting(notes: list[str]) -> Iterator[None]:
    """Append every warning that is logged inside the context to `notes`, each once."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() not in notes:
                notes.append(record.getMessage())

    logger, collector = logging.getLogger("prunus"), Collector(logging.WARNING)
    logger.addHandler(collector)
    try:
        yield
    finally:
        logger.removeHandler(collector)
