"""WAV files: their chunks, and samples that are plain integers.

FFmpeg reads a sample by its valid bits and not by the size of its container, so it makes noise of
24 bits in 32. `pcm_blocks` reads by the container, and without FFmpeg's probing of the file. The
layout is that of Microsoft's "Multiple channel audio data and WAVE files" and of EBU Tech 3306
(RF64).
"""

import dataclasses
import io
import os
import pathlib
import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

_MAGIC = (b"RIFF", b"RF64", b"BW64")
_PCM, _EXTENSIBLE = 0x0001, 0xFFFE
_MAX_CHUNKS = 1000
_MAX_RATE = 1_000_000

# Sizes that stand for "until the end of the file", as programs write into a pipe.
_OPEN_SIZE = 0x7FFF_0000


@dataclasses.dataclass(frozen=True)
class WavHeader:
    """What the chunks of a WAV file say.

    Attributes:
        codec: Format tag, that of the subformat in an extensible format.
        channels: Number of channels.
        rate: Samples a second.
        block_align: Bytes of a sample in all channels.
        valid_bits: Bits of a sample that carry sound.
        byte_rate: Bytes a second.
        data_start: Offset of the samples in bytes.
        data_size: Announced size of the samples in bytes; None if it is open.
        file_size: Size of the file in bytes.
    """

    codec: int
    channels: int
    rate: int
    block_align: int
    valid_bits: int
    byte_rate: int
    data_start: int
    data_size: int | None
    file_size: int

    @property
    def container_bytes(self) -> int:
        """Bytes that a sample of one channel takes."""
        return self.block_align // max(1, self.channels)

    @property
    def is_pcm(self) -> bool:
        """Whether `pcm_blocks` reads the samples.

        FFmpeg reads samples of 8 bits, which are unsigned, and knows the places of more than two
        channels.
        """
        is_wide = (self.valid_bits + 7) // 8 < self.container_bytes
        return (
            self.codec == _PCM
            and self.channels > 0
            and 0 < self.rate <= _MAX_RATE
            and self.block_align == self.channels * self.container_bytes
            and 2 <= self.container_bytes <= 4
            and 0 < self.valid_bits <= 8 * self.container_bytes
            and (is_wide or self.channels <= 2)
        )

    @property
    def missing_seconds(self) -> float:
        """Seconds of sound that are announced but not in the file."""
        byte_rate = self.rate * self.block_align if self.codec == _PCM else self.byte_rate
        if self.data_size is None or byte_rate <= 0:
            return 0.0
        return max(0, self.data_start + self.data_size - self.file_size) / byte_rate


def read_header(source: str | os.PathLike[str] | bytes) -> WavHeader | None:
    """Reads the chunks of a WAV file up to its samples.

    Args:
        source: Path or content of the file.

    Returns:
        The header; None if it is no WAV file, or one without the chunks `fmt ` and `data`.
    """
    with _opened(source) as file:
        file_size = file.seek(0, os.SEEK_END)
        file.seek(0)
        return _read_header(file, file_size)


def _opened(source: str | os.PathLike[str] | bytes) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else pathlib.Path(source).open("rb")


def _read_header(file: BinaryIO, file_size: int) -> WavHeader | None:
    magic = file.read(12)
    if len(magic) < 12 or magic[:4] not in _MAGIC or magic[8:] != b"WAVE":
        return None
    fmt, long_data_size = b"", None
    for _ in range(_MAX_CHUNKS):
        chunk = file.read(8)
        if len(chunk) < 8:
            return None
        name, size = chunk[:4], int.from_bytes(chunk[4:], "little")
        if name == b"data":
            break
        start = file.tell()
        if name == b"fmt ":
            fmt = file.read(min(size, 40))
        elif name == b"ds64":
            sizes = file.read(min(size, 16))
            long_data_size = int.from_bytes(sizes[8:16], "little")
        file.seek(start + size + size % 2)  # Chunks begin at even offsets.
    else:
        return None
    if len(fmt) < 16:
        return None
    codec, channels, rate, byte_rate, block_align, bits = struct.unpack("<HHIIHH", fmt[:16])
    if codec == _EXTENSIBLE and len(fmt) >= 26:
        valid_bits, codec = struct.unpack("<H4xH", fmt[18:26])
        bits = valid_bits or bits
    data_size: int | None = size
    if magic[:4] != b"RIFF" and long_data_size is not None and size == 0xFFFF_FFFF:
        data_size = long_data_size
    elif size == 0 or size >= _OPEN_SIZE:
        data_size = None
    return WavHeader(
        codec=codec,
        channels=channels,
        rate=rate,
        block_align=block_align,
        valid_bits=bits,
        byte_rate=byte_rate,
        data_start=file.tell(),
        data_size=data_size,
        file_size=file_size,
    )


def pcm_blocks(
    source: str | os.PathLike[str] | bytes, header: WavHeader, first: int, size: int
) -> Iterator[np.ndarray]:
    """Reads samples that are integers, by the size of their containers.

    Valid bits are the highest ones of a container.

    Args:
        source: Path or content of the file.
        header: Its header; `is_pcm` is true.
        first: Index of the first sample.
        size: Samples in a block.

    Yields:
        Blocks [n, channels] int16 of full scale 2^15, or int32 of full scale 2^31 if containers
        have more than 16 bits.
    """
    width, end = header.container_bytes, header.file_size
    if header.data_size is not None:
        end = min(end, header.data_start + header.data_size)
    with _opened(source) as file:
        file.seek(header.data_start + first * header.block_align)
        left = (end - file.tell()) // header.block_align
        while left > 0 and (block := file.read(min(size, left) * header.block_align)):
            block = block[: len(block) // header.block_align * header.block_align]
            left -= len(block) // header.block_align
            if width != 3:
                yield np.frombuffer(block, f"<i{width}").reshape(-1, header.channels)
                continue
            # Bytes are little-endian, so the container is the upper end of a 32-bit one.
            wide = np.zeros((len(block) // 3, 4), np.uint8)
            wide[:, 1:] = np.frombuffer(block, np.uint8).reshape(-1, 3)
            yield wide.view("<i4").reshape(-1, header.channels)
