"""WAV files: all headers are decoded exactly, and only truncated files are damaged."""

import pathlib
import struct

import numpy as np
import pytest

from mister_jax.data.audio import (
    SAMPLE_RATE,
    AudioError,
    DecodeRequest,
    decode,
    decode_many,
    encode_wav,
)
from mister_jax.data.audio_reader import AudioReader

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE

# Valid bits, container bytes, and whether the header has the extensible format.
CONTAINERS = [
    (16, 2, False),
    (16, 2, True),
    (24, 3, False),
    (24, 3, True),
    (32, 4, False),
    (24, 4, True),
    (20, 4, True),
    (16, 4, True),
    (16, 3, True),
    (20, 3, True),
    (12, 2, True),
    (24, 4, False),
    (16, 3, False),
]


def tone(seconds: float = 2.0) -> np.ndarray:
    """Returns a tone [N] float64 whose amplitude grows from 0.1 to 0.5 of full scale."""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return np.linspace(0.1, 0.5, len(time)) * np.sin(2 * np.pi * 440 * time)


def chunk(name: bytes, content: bytes, size: int | None = None) -> bytes:
    size = len(content) if size is None else size
    return name + struct.pack("<I", size) + content + bytes(len(content) % 2)


def fmt_chunk(channels, container, bits, *, codec=PCM, extensible=False) -> bytes:
    align = channels * container
    head = (channels, SAMPLE_RATE, SAMPLE_RATE * align, align)
    if not extensible:
        return chunk(b"fmt ", struct.pack("<HHIIHH", codec, *head, bits))
    guid = struct.pack("<H", codec) + bytes.fromhex("000000001000800000aa00389b71")
    fields = struct.pack("<HHIIHHHHI", EXTENSIBLE, *head, 8 * container, 22, bits, 0)
    return chunk(b"fmt ", fields + guid)


def riff(*chunks: bytes, magic: bytes = b"RIFF") -> bytes:
    body = b"WAVE" + b"".join(chunks)
    return magic + struct.pack("<I", len(body)) + body


def pack(samples: np.ndarray, bits: int, container: int) -> tuple[bytes, np.ndarray]:
    """Returns samples [N, C] as bytes, and their values on the scale of int16.

    Each sample has `bits` bits in a container of `container` bytes.
    """
    values = np.rint(samples * 2 ** (bits - 1)).astype(np.int64)
    left = (values << (8 * container - bits)).astype("<i8")
    content = left.view(np.uint8).reshape(*left.shape, 8)[..., :container].tobytes()
    return content, values / 2.0 ** (bits - 16)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("bits", "container", "extensible"), CONTAINERS)
def test_samples_are_decoded_by_container_size(bits, container, extensible, channels):
    samples = np.stack([tone()] * channels, axis=1)
    content, values = pack(samples, bits, container)
    fmt = fmt_chunk(channels, container, bits, extensible=extensible)
    clip = decode(riff(fmt, chunk(b"data", content)))
    assert clip.seconds == 2 and not clip.damaged
    np.testing.assert_allclose(clip.samples, values[:, 0], atol=1)


def test_cut_of_wide_container_equals_part_of_entire_recording():
    content, values = pack(tone(4.0)[:, None], 24, 4)
    file = riff(fmt_chunk(1, 4, 24, extensible=True), chunk(b"data", content))
    cut = decode(file, start=2.5, end=3.0)
    np.testing.assert_allclose(cut.samples, values[40_000:48_000, 0], atol=1)


def wave_file(*, before: bytes = b"", size: int | None = None, magic: bytes = b"RIFF") -> bytes:
    content = pack(tone()[:, None], 16, 2)[0]
    return riff(before, fmt_chunk(1, 2, 16), chunk(b"data", content, size), magic=magic)


LIST = chunk(b"LIST", b"INFOICMT" + struct.pack("<I", 12) + b"the data here"[:12])
BEXT = chunk(b"bext", b"recorded as data\xff\xff\xff\x10 data" + bytes(575))
DS64 = chunk(b"ds64", struct.pack("<QQQI", 64_100, 64_000, 32_000, 0))

COMPLETE = {
    "plain": wave_file(),
    "a comment with the word data": wave_file(before=LIST),
    "a broadcast header with the word data": wave_file(before=BEXT),
    "a comment and an open length": wave_file(before=LIST, size=0xFFFF_FFFF),
    "an empty length": wave_file(size=0),
    "a length of a pipe": wave_file(size=0x7FFF_F000),
    "44 bytes too large": wave_file(size=64_044),
    "an odd chunk before": wave_file(before=chunk(b"junk", b"odd")),
    "RF64": wave_file(before=DS64, size=0xFFFF_FFFF, magic=b"RF64"),
    "chunks behind": wave_file() + chunk(b"LIST", b"INFO"),
}
TRUNCATED = {
    "plain": wave_file()[:-32_000],
    "a comment with the word data": wave_file(before=LIST)[:-32_000],
    "RF64": wave_file(before=DS64, size=0xFFFF_FFFF, magic=b"RF64")[:-32_000],
}


@pytest.mark.parametrize("name", COMPLETE)
def test_complete_file_is_not_damaged(name):
    clip = decode(COMPLETE[name])
    assert (clip.seconds, clip.damaged) == (2, False)
    np.testing.assert_allclose(clip.samples, tone() * 2**15, atol=1)


@pytest.mark.parametrize("name", TRUNCATED)
def test_truncated_file_is_damaged(name):
    clip = decode(TRUNCATED[name])
    assert (clip.seconds, clip.damaged) == (1, True)
    assert not decode(TRUNCATED[name], end=0.5).damaged


def test_only_cuts_at_the_truncated_end_are_damaged():
    file = TRUNCATED["plain"]
    requests = [DecodeRequest(file, 0, 0.5), DecodeRequest(file, 0.75, 1.5), DecodeRequest(file)]
    clips = list(decode_many(requests, num_workers=0))
    assert [clip.damaged for clip in clips] == [False, True, True]


def float_file(samples: np.ndarray, channels: int = 1) -> bytes:
    content = samples.astype("<f4").tobytes()
    return riff(fmt_chunk(channels, 4, 32, codec=FLOAT), chunk(b"data", content))


def test_floats_beyond_full_scale_are_scaled_and_noted():
    samples = 4 * tone()  # 6 dB over full scale
    clip = decode(float_file(samples))
    assert clip.notes == ("scaled by 0.50: its peak is 6.0 dB over full scale",)
    scale = 1 / np.abs(samples).max()
    np.testing.assert_allclose(clip.samples, samples * scale * 2**15, atol=1.5)


def test_floats_slightly_beyond_full_scale_are_clipped():
    clip = decode(float_file(2.1 * tone()))
    assert clip.notes == ()
    assert clip.samples.max() == 2**15 - 1


def test_floats_in_integer_range_are_read_as_integers():
    clip = decode(float_file(tone() * 2**15))
    assert clip.notes == ("floats of up to 16378.7 read as integers of 16 bits",)
    np.testing.assert_allclose(clip.samples, tone() * 2**15, atol=1)


def test_strongest_channel_is_used_if_channels_cancel_out():
    left, right = 0.5 * tone(), -tone()
    file = float_file(np.stack([left, 0.5 * right], axis=1), channels=2)
    for start, end in ((None, None), (0.7, 1.1)):
        clip = decode(file, start=start, end=end)
        assert clip.notes == ("channels cancel out: only channel 0 is used",)
        expected = left[int((start or 0) * SAMPLE_RATE) : int((end or 2) * SAMPLE_RATE)]
        np.testing.assert_allclose(clip.samples, expected * 2**15, atol=1)
    mixed = decode(float_file(np.stack([left, right], axis=1), channels=2))
    assert mixed.notes == ()
    np.testing.assert_allclose(mixed.samples, (left + right) / 2 * 2**15, atol=1)


def test_implausibly_large_floats_are_refused():
    with pytest.raises(AudioError, match=r"damaged: .* \(float samples of up to 1e\+30"):
        decode(float_file(1e30 * np.sign(tone()), channels=2))


def test_documentation_lists_containers():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "your_own_data.md").read_text()
    for bits, container, extensible in CONTAINERS:
        assert f"| {bits} | {container} | {'extensible' if extensible else 'plain'} |\n" in page


def test_the_channels_of_a_cut_are_compared_in_its_bins_only(tmp_path):
    visited = []

    class Bins(dict):
        def __iter__(self):
            visited.extend(range(len(self)))
            return super().__iter__()

        def items(self):
            visited.extend(range(len(self)))
            return super().items()

        def __getitem__(self, index):
            visited.append(index)
            return super().__getitem__(index)

    path = tmp_path / "call.wav"
    encode_wav(path, np.zeros((16_000, 2), np.int16))
    reader = AudioReader(path, "mix")
    # Each array has the powers of both channels and of their mix. Only one channel has sound until
    # 500 s. After that, the channels cancel out.
    reader._powers = Bins(
        {
            index: np.array([0.0, 9.0, 4.0] if index < 2000 else [5.0, 6.0, 0.0])
            for index in range(4000)
        }
    )
    assert reader.canceled_by(0, 16_000) is None
    assert reader.canceled_by(999 * 16_000, 1000 * 16_000) == 1
    assert reader.canceled_by(2000 * 16_000, 2001 * 16_000) is None
    assert len(visited) < 20
    assert reader.canceled_by(600 * 16_000, 2**63) == 1
