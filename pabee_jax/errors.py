"""The one exception for mistakes that a person can mend."""


class InputError(ValueError):
    """Something the user gave is wrong; the message is one sentence that says what would be right.

    The command-line programs print it without a stack trace and exit with status 2.
    """
