"""The one exception for mistakes that a user can mend, and how its line stays one."""


class UserError(Exception):
    """Bad input, told in one line: what, where, what to do. The command exits with 2."""


def printable(text: str) -> str:
    """`text`, escaped where it would break a message's one line or cannot be printed at all."""
    return text if text.isprintable() else repr(text)[1:-1]


def first_line(error: BaseException) -> str:
    """What `error` says, for a message of one line."""
    return (str(error).strip().splitlines() or [repr(error)])[0]
