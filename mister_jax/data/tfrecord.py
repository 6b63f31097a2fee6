"""Reader of TFRecord files that does not need TensorFlow, which takes seconds to import."""

import struct
from collections.abc import Iterable, Iterator

from etils import epath

from mister_jax.data.lazy import google_crc32c
from mister_jax.errors import InputError

_HEADER = struct.Struct("<QI")
"""Length of a record, and checksum of the length."""

_FOOTER = struct.Struct("<I")
"""Checksum of a record."""

_REMEDY = "copy the dataset again, or create it again with --overwrite"


def read_records(paths: Iterable[epath.PathLike], num_records: Iterable[int]) -> Iterator[bytes]:
    """Yields the records of uncompressed TFRecord files, one file after another.

    Args:
        paths: Paths of the files.
        num_records: Number of records in each file.

    Raises:
        InputError: A file is missing or truncated, or a checksum does not match.
    """
    for path, expected in zip(map(epath.Path, paths), num_records, strict=True):
        try:
            opened = path.open("rb")
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such file; {_REMEDY}") from error
        with opened as file:
            count = offset = 0
            while header := file.read(_HEADER.size):
                if len(header) < _HEADER.size:
                    raise _damaged(path, offset)
                length, length_checksum = _HEADER.unpack(header)
                # A wrong length could request more memory than the machine has.
                if _masked_checksum(header[:8]) != length_checksum:
                    raise _damaged(path, offset)
                record, footer = file.read(length), file.read(_FOOTER.size)
                if len(footer) < _FOOTER.size:
                    raise _damaged(path, offset)
                if _masked_checksum(record) != _FOOTER.unpack(footer)[0]:
                    raise _damaged(path, offset)
                yield record
                count += 1
                offset += _HEADER.size + length + _FOOTER.size
            if count != expected:
                raise InputError(f"{path}: damaged: {count} of {expected} records; {_REMEDY}")


def _masked_checksum(data: bytes) -> int:
    """Returns the CRC-32C in the masked form that TFRecord files store."""
    checksum = google_crc32c.value(data)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _damaged(path: epath.Path, offset: int) -> InputError:
    return InputError(f"{path}: damaged record at byte {offset}; {_REMEDY}")
