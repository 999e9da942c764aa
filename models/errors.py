"""Exceptions for mistakes that a user can fix; verbs print them in one line and exit with 2."""


class UserError(Exception):
    """A user's mistake; the message is one line naming the file, row, flag or field at fault."""


class RowError(UserError):
    """A single row that cannot be processed; the other rows can."""


class SourceFailure(UserError):
    """A source of rows that cannot be read any more, by no fault of a row: a disk or a network."""
