"""The one exception for mistakes that a user can mend."""


class UserError(Exception):
    """Bad input, told in one line: what, where, what to do. The command exits with 2."""
