"""Reads the header and the integer samples of WAV files.

FFmpeg derives the size of a sample from the number of valid bits, so it decodes 24 valid bits in a
32-bit container to noise. `pcm_blocks` uses the container's size. Microsoft's "Multiple channel
audio data and WAVE files" and EBU Tech 3306 (RF64) specify the file format.
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

# Sizes of at least this value mean "until the end of the file", unless a `ds64` chunk states the
# size. Programs that write to a pipe use such sizes, because the length is not known in advance.
_OPEN_SIZE = 0x7FFF_0000


@dataclasses.dataclass(frozen=True)
class WavHeader:
    """Header of a WAV file.

    Attributes:
        codec: Format tag; in the extensible format, the tag of the subformat.
        rate: Sample rate in Hz.
        block_align: Bytes per sample, summed over the channels.
        valid_bits: Number of bits per sample that carry sound.
        byte_rate: Bytes per second.
        data_start: Offset of the samples in bytes.
        data_size: Size of all samples in bytes; None if they extend to the end of the file.
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
        """Bytes per sample and channel."""
        return self.block_align // max(1, self.channels)

    @property
    def is_pcm(self) -> bool:
        """Whether `pcm_blocks` should read the samples.

        False for files that FFmpeg should read: files with compressed or float samples, files with
        8-bit samples, which are unsigned, and files with more than two channels, whose layout only
        FFmpeg knows. True for any number of channels if integer samples are stored with padding
        bytes (such as 24 bits in 4 bytes), which FFmpeg would misread.
        """
        has_padding_bytes = (self.valid_bits + 7) // 8 < self.container_bytes
        return (
            self.codec == _PCM
            and self.channels > 0
            and 0 < self.rate <= _MAX_RATE
            and self.block_align == self.channels * self.container_bytes
            and 2 <= self.container_bytes <= 4
            and 0 < self.valid_bits <= 8 * self.container_bytes
            and (has_padding_bytes or self.channels <= 2)
        )

    @property
    def seconds(self) -> float:
        """Seconds of sound in a file with integer samples."""
        num_bytes = self.file_size - self.data_start
        if self.data_size is not None:
            num_bytes = min(num_bytes, self.data_size)
        return max(0, num_bytes) / (self.rate * self.block_align)

    @property
    def missing_seconds(self) -> float:
        """Seconds of sound that the header states but the file does not contain."""
        byte_rate = self.rate * self.block_align if self.codec == _PCM else self.byte_rate
        if self.data_size is None or byte_rate <= 0:
            return 0.0
        return max(0, self.data_start + self.data_size - self.file_size) / byte_rate


def read_header(source: str | os.PathLike[str] | bytes) -> WavHeader | None:
    """Returns a WAV file's header, or None if the file is not WAV or lacks `fmt ` or `data`."""
    with _open(source) as file:
        return _read_header(file)


def _open(source: str | os.PathLike[str] | bytes) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else pathlib.Path(source).open("rb")


def _read_header(file: BinaryIO) -> WavHeader | None:
    magic = file.read(12)
    if len(magic) < 12 or magic[:4] not in _MAGIC or magic[8:] != b"WAVE":
        return None
    fmt, data_size_64 = b"", None
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
            data_size_64 = int.from_bytes(file.read(min(size, 16))[8:16], "little")
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
    if magic[:4] != b"RIFF" and data_size_64 is not None and size == 0xFFFF_FFFF:
        data_size = data_size_64
    elif size == 0 or size >= _OPEN_SIZE:
        data_size = None
    data_start = file.tell()
    return WavHeader(
        codec=codec,
        channels=channels,
        rate=rate,
        block_align=block_align,
        valid_bits=bits,
        byte_rate=byte_rate,
        data_start=data_start,
        data_size=data_size,
        file_size=file.seek(0, os.SEEK_END),
    )


def pcm_blocks(
    source: str | os.PathLike[str] | bytes, header: WavHeader, first: int, size: int
) -> Iterator[np.ndarray]:
    """Reads the integer samples of a WAV file from index `first` on. `header.is_pcm` must be true.

    Yields:
        Blocks [size, channels] int16 with full scale 2^15, or int32 with full scale 2^31 if a
        sample occupies more than 16 bits in the file. The valid bits are the highest bits of each
        integer.
    """
    end = header.file_size
    if header.data_size is not None:
        end = min(end, header.data_start + header.data_size)
    with _open(source) as file:
        file.seek(header.data_start + first * header.block_align)
        num_left = (end - file.tell()) // header.block_align
        while num_left > 0 and (block := file.read(min(size, num_left) * header.block_align)):
            block = block[: len(block) // header.block_align * header.block_align]
            num_left -= len(block) // header.block_align
            if header.container_bytes != 3:
                dtype = f"<i{header.container_bytes}"
                yield np.frombuffer(block, dtype).reshape(-1, header.channels)
                continue
            # Samples are little-endian, so bytes 1 to 3 are the highest bytes of 32-bit samples.
            wide = np.zeros((len(block) // 3, 4), np.uint8)
            wide[:, 1:] = np.frombuffer(block, np.uint8).reshape(-1, 3)
            yield wide.view("<i4").reshape(-1, header.channels)
