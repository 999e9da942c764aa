"""Reads again what a network or a network disk failed to deliver.

The libraries retry single requests (`datasets` a stream's reads for 100 s); this is for what they
give up on, and for files.
"""

import time
from collections.abc import Callable
from typing import TypeVar

from distill.runtime import run_files
from models.errors import SourceFailure

WAIT_SECONDS = (1.0, 5.0, 25.0)  # before each further try

# Packages whose errors are those of a connection, if they are not OSError anyway.
_NETWORK_PACKAGES = ("aiohttp", "fsspec", "gcsfs", "httpcore", "httpx", "requests", "urllib3")

Row = TypeVar("Row")


def retry_reads(read_row: Callable[[int], Row], name: str) -> Callable[[int], Row]:
    """Returns `read_row`, which reads the rows of source `name`, with retries.

    It then raises:
      SourceFailure: if a row cannot be read in any of the tries.
      UserError: at once, for a fault of the row itself.
    """

    def read_with_retries(index: int) -> Row:
        waits = iter(WAIT_SECONDS)
        while True:
            try:
                return read_row(index)
            except Exception as error:
                failure = find_connection_error(error)
                if failure is None:
                    raise
                text = getattr(failure, "strerror", None) or str(failure).strip()
                reason = (text or type(failure).__name__).splitlines()[0]
                seconds = next(waits, None)
                if seconds is None:
                    raise SourceFailure(
                        f"{name}: row {index} could not be read in {len(WAIT_SECONDS) + 1} tries: "
                        f"{reason}"
                    ) from error
            run_files.log_line(f"warning: {name}: {reason}; trying again in {seconds:g} s")
            time.sleep(seconds)

    return read_with_retries


def find_connection_error(error: BaseException | None) -> BaseException | None:
    """Returns the error of a disk or a connection that `error` is, or was raised from."""
    while error is not None:
        package = type(error).__module__.partition(".")[0]
        if isinstance(error, OSError) or package in _NETWORK_PACKAGES:
            return error
        error = error.__cause__
    return None
