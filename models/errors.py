"""Exceptions that end a verb with one line: mistakes that a user can fix, and signals."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """A user's mistake; the message is one line naming the file, row, flag or field at fault."""


class UserErrors(UserError):
    """Several mistakes, of which a verb prints each in a line of its own."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__("; ".join(messages))
        self.messages = messages


@contextlib.contextmanager
def name_key(key: str, value: str) -> Iterator[None]:
    """Context in which an error about the file or directory `value` also names the config key that
    it is from."""
    try:
        yield
    except UserError as error:
        if not value or not str(error).startswith(value):
            raise
        raise UserError(f"{key}={error}") from error


def suggest(name: object, known: Iterable[object]) -> str:
    """Returns "; did you mean 'NAME'?" with the nearest of the known names; "" if none is near."""
    nearest = difflib.get_close_matches(str(name), [str(x) for x in known], 1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


class RowError(UserError):
    """A single row that cannot be processed; the other rows can."""


class PromptTooLong(UserError):
    """A row whose prompt has more than the allowed number of tokens."""

    def __init__(self, message: str, tokens: int) -> None:
        super().__init__(message)
        self.tokens = tokens


class SourceFailure(UserError):
    """A source of rows that cannot be read any more, by no fault of a row: a disk or a network."""


class Interrupted(KeyboardInterrupt):
    """The signal `number` asked this process to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
