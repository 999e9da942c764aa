"""Exceptions that end a verb with one line: mistakes that a user can fix, and signals."""


class UserError(Exception):
    """A user's mistake; the message is one line naming the file, row, flag or field at fault."""


class RowError(UserError):
    """A single row that cannot be processed; the other rows can."""


class LongPromptError(UserError):
    """A prompt of `tokens` tokens, longer than the `limit` that `field` sets."""

    def __init__(self, where: str, tokens: int, limit: int, field: str) -> None:
        super().__init__(f"{where}: prompt of {tokens:,} tokens, {field} allows {limit:,}")
        self.where, self.tokens, self.limit, self.field = where, tokens, limit, field


class SourceFailure(UserError):
    """A source of rows that cannot be read any more, by no fault of a row: a disk or a network."""


class Interrupted(KeyboardInterrupt):
    """The signal `number` asked this process to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
