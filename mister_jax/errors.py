"""The error for what a user gave and the library cannot use."""


class InputError(ValueError):
    """A file, a value or a name from the user cannot be used.

    The message is one line and says what is wrong, where, and what is allowed. The scripts in
    `launch/` print it without a traceback.
    """
