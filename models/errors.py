"""The one exception for what a user can mend; every verb turns it into one line and exit code 2."""


class UserError(Exception):
    """A user's mistake; the message is one line naming the file, row, flag or field at fault."""


class RowError(UserError):
    """One row among others that cannot be worked on; the others can."""
