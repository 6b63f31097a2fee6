"""Reads text files of released corpora, some of which are not UTF-8."""

import pathlib

from mister_jax.errors import InputError


def read_any_text(path: pathlib.Path) -> tuple[str, bool]:
    """Reads a text file in UTF-8 or in cp1252, the encoding of older Windows programs.

    Returns:
        The text, and whether the file is UTF-8.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return data.decode("utf-8-sig"), True
    except UnicodeDecodeError:
        # Five bytes are undefined in cp1252.
        return data.decode("cp1252", errors="replace"), False
