"""Error for invalid user input."""


class InputError(ValueError):
    """Raised if a file, value or name given by the user cannot be used.

    The message is one line that says what is wrong, where, and what is allowed. The command line
    prints it without a traceback.
    """
