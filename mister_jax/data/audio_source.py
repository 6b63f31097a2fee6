"""Types and checks for the source and the channel of a recording."""

import contextlib
import enum
import os
import pathlib
import stat
import unicodedata
from typing import Any

from mister_jax.errors import InputError

Source = str | os.PathLike[str] | bytes
"""Path or content of a file."""

Channel = str | int
"""Channel of a recording: "mix", "left", "right", or an index from 0."""

MIX = "mix"
NAMED_CHANNELS = {"left": 0, "right": 1}

RECORDING_SUFFIXES = (
    *(".aac", ".aif", ".aiff", ".amr", ".au", ".flac", ".m4a", ".m4b", ".mp2", ".mp3", ".oga"),
    *(".ogg", ".opus", ".sph", ".wav", ".wma", ".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov"),
    *(".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv"),
)
"""File extensions of recordings. Other files in a folder are ignored."""


class Reason(enum.StrEnum):
    """Why a recording cannot be used."""

    MISSING = "no such file"
    UNREADABLE = "cannot be read"
    EMPTY = "empty file"
    FORMAT = "not a format that FFmpeg reads, or damaged at its beginning"
    NO_AUDIO = "no audio stream that FFmpeg decodes"
    NO_CHANNEL = "no such channel"
    DAMAGED = "damaged: nothing could be decoded"
    NO_SAMPLES = "no samples"
    RANGE = "the cut is not in the recording"
    CRASH = "the decoder crashed"


class AudioError(InputError):
    """Reports an unusable recording. `detail` is a message, such as FFmpeg's."""

    def __init__(self, reason: Reason, source: str, detail: str = "") -> None:
        super().__init__(reason, source, detail)  # Pickle calls `__init__` with these arguments.
        self.reason = reason
        self.source = source
        self.detail = " ".join(detail.split())

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


def check_channel(channel: Any) -> Channel:
    """Returns a valid channel, and converts an index that is passed as text.

    Raises:
        ValueError: The value is not a channel.
    """
    names = (MIX, *NAMED_CHANNELS)
    if isinstance(channel, str) and channel.strip().isdecimal():
        channel = int(channel)
    is_index = isinstance(channel, int) and not isinstance(channel, bool) and channel >= 0
    if channel in names or is_index:
        return channel
    raise ValueError(f"{channel!r}; allowed: {', '.join(names)}, or the index of a channel from 0")


def existing_path(path: str | os.PathLike[str]) -> str:
    """Finds an existing file whose path may use another Unicode normalization.

    Accented letters in file names may be decomposed (NFD), as often on macOS, or composed (NFC), as
    usually on other systems. If no such file exists in either form, the path is returned unchanged.
    """
    path = os.fspath(path)
    if path.isascii():
        return path
    with contextlib.suppress(OSError, ValueError):
        if pathlib.Path(path).exists():
            return path
        parts = pathlib.Path(path).parts
        existing = pathlib.Path(parts[0])
        for part in parts[1:]:
            forms = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
            existing /= next((form for form in forms if (existing / form).exists()), part)
        if existing.exists():
            return str(existing)
    return path


def source_name(source: Source) -> str:
    """Returns a recording's path, or the size of a recording that is in memory."""
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else os.fspath(source)


def check_readable(source: Source, name: str) -> None:
    """Checks a recording before FFmpeg opens it, because FFmpeg's errors are less specific.

    Raises:
        AudioError: The recording is missing, empty, not a regular file, or not readable.
    """
    if isinstance(source, bytes):
        if not source:
            raise AudioError(Reason.EMPTY, name)
        return
    path = pathlib.Path(source)
    try:
        status = path.stat()
        # Reading a pipe could block forever.
        is_file = stat.S_ISREG(status.st_mode)
        if is_file:
            path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        raise AudioError(Reason.MISSING, name) from None
    except (OSError, ValueError) as error:
        raise AudioError(Reason.UNREADABLE, name, error_message(error)) from None
    if not is_file:
        raise AudioError(Reason.UNREADABLE, name, "not a file")
    if status.st_size == 0:
        raise AudioError(Reason.EMPTY, name)


def error_message(error: Exception) -> str:
    """Returns an error's message without the file name."""
    return getattr(error, "strerror", None) or str(error)
