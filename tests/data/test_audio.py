"""Decoding of recordings: formats, segments, channels, broken files and parallel processes."""

import os
import pathlib
import pickle
import signal
import subprocess
import sys
import tracemalloc
import wave

import av
import numpy as np
import pytest

from mister_jax.data import audio, audio_reader
from mister_jax.data.audio import AudioError, Clip, DecodeRequest, Reason, decode, decode_many
from mister_jax.data.workers import QUEUED_PER_WORKER
from mister_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[2]
RATE = audio.SAMPLE_RATE

# File name -> codec, sample rate and channel layout. Each file holds a tone of 440 Hz.
FORMATS = {
    "mono.wav": ("pcm_s16le", 16_000, "mono"),
    "telephone.wav": ("pcm_s16le", 8_000, "mono"),
    "studio.wav": ("pcm_s32le", 96_000, "stereo"),
    "float.wav": ("pcm_f32le", 22_050, "mono"),
    "disc.flac": ("flac", 44_100, "stereo"),
    "disc.mp3": ("mp3", 44_100, "stereo"),
    "film.mp4": ("aac", 48_000, "stereo"),
    "surround.mp4": ("aac", 48_000, "5.1"),
    "disc.m4a": ("aac", 44_100, "mono"),
    "film.mkv": ("aac", 48_000, "stereo"),
    "call.ogg": ("libopus", 48_000, "mono"),
}


def tone(seconds: float, rate: int, hertz: float = 440.0, amplitude: float = 8000.0) -> np.ndarray:
    """Returns a tone [N] int16 with growing amplitude, so that no two parts are equal."""
    time = np.arange(round(seconds * rate)) / rate
    growth = (1 + time / seconds) / 2
    return np.rint(growth * amplitude * np.sin(2 * np.pi * hertz * time)).astype(np.int16)


def write(
    path: pathlib.Path,
    channels: np.ndarray,
    codec: str,
    rate: int,
    layout: str,
    *,
    with_picture: bool = False,
    format: str | None = None,
    options: dict[str, str] | None = None,
) -> pathlib.Path:
    """Encodes channels [C, N] int16 to a file."""
    with av.open(str(path), "w", format=format, options=options or {}) as container:
        if with_picture:
            picture = container.add_stream("mpeg4", rate=25)
            picture.width = picture.height = 32
            picture.pix_fmt = "yuv420p"
        if len(channels):
            sound = container.add_stream(codec, rate=rate)
            sound.layout = layout
        if with_picture:
            for index in range(10):
                frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
                frame.pts = index
                container.mux(picture.encode(frame))
            container.mux(picture.encode(None))
        if len(channels):
            samples = np.ascontiguousarray(channels.T).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout=layout)
            frame.sample_rate = rate
            frame.pts = 0
            container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Returns a file of 6.5 s in each of `FORMATS`."""
    folder = tmp_path_factory.mktemp("audio")
    return {
        name: write(
            folder / name,
            np.tile(tone(6.5, rate), (av.AudioLayout(layout).nb_channels, 1)),
            codec,
            rate,
            layout,
            with_picture=name.endswith(".mp4"),
        )
        for name, (codec, rate, layout) in FORMATS.items()
    }


def wav(path: pathlib.Path, samples: np.ndarray, rate: int = RATE) -> pathlib.Path:
    audio.encode_wav(path, samples, rate)
    return path


def level(samples: np.ndarray) -> float:
    """Returns the root mean square of samples."""
    return float(np.sqrt(np.mean(samples.astype(np.float64) ** 2)))


def peak_frequency(samples: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum)) * RATE / len(samples)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_preserves_tone_level_and_length(files, name):
    clip = decode(files[name])
    assert clip.samples.dtype == np.int16
    assert clip.samples.ndim == 1
    # Codecs that work in blocks pad the last block.
    assert len(clip.samples) / RATE == pytest.approx(6.5, abs=0.025)
    assert clip.seconds == len(clip.samples) / RATE
    assert peak_frequency(clip.samples) == pytest.approx(440, abs=0.3)
    assert level(clip.samples) == pytest.approx(level(tone(6.5, RATE)), rel=0.06)
    assert not clip.capped
    assert not clip.damaged


def test_samples_at_16_khz_are_unchanged(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32767, 5000).astype(np.int16)
    np.testing.assert_array_equal(decode(wav(tmp_path / "a.wav", samples)).samples, samples)


def test_file_content_is_decoded_like_the_file(files):
    for name in ("disc.flac", "film.mp4"):
        in_memory = decode(files[name].read_bytes())
        np.testing.assert_array_equal(in_memory.samples, decode(files[name]).samples)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("start", "end"), [(None, 0.7), (0.51, 0.7), (3.33333, 3.9), (4.00001, None), (5, 90)]
)
def test_cut_equals_part_of_entire_recording(files, name, start, end):
    samples = decode(files[name]).samples
    cut = decode(files[name], start=start, end=end)
    expected = samples[round((start or 0) * RATE) : None if end is None else round(end * RATE)]
    assert len(cut.samples) == len(expected)
    assert cut.seconds == len(expected) / RATE
    np.testing.assert_allclose(cut.samples, expected, atol=100 if "aac" in FORMATS[name] else 1)


def test_cut_of_long_recording_seeks(tmp_path, monkeypatch):
    silence = np.zeros((400 * 8000, 2), np.int16)
    num_frames = 0
    original = audio_reader.AudioReader._timed_frames

    def count_frames(self, lead):
        nonlocal num_frames
        for frame in original(self, lead):
            num_frames += 1
            yield frame

    monkeypatch.setattr(audio_reader.AudioReader, "_timed_frames", count_frames)
    unsigned = tmp_path / "unsigned.wav"
    with wave.open(str(unsigned), "wb") as file:  # FFmpeg, not `wav.py`, decodes 8-bit WAV.
        file.setnchannels(2)
        file.setsampwidth(1)
        file.setframerate(8000)
        file.writeframes(np.full((400 * 8000, 2), 128, np.uint8).tobytes())
    for path in (wav(tmp_path / "signed.wav", silence, 8000), unsigned):
        num_frames = 0
        assert decode(path, start=390, end=391).seconds == 1
        num_frames_of_cut, num_frames = num_frames, 0
        decode(path)
        assert 0 < num_frames_of_cut < num_frames / 50


@pytest.mark.parametrize(
    ("channel", "share"),
    [("FL", 0.207), ("FR", 0.207), ("FC", 0.293), ("LFE", 0.0), ("BL", 0.146), ("BR", 0.146)],
)
def test_center_of_5_1_has_largest_mixing_weight(tmp_path, channel, share):
    channels = np.zeros((6, RATE), np.int16)
    channels[["FL", "FR", "FC", "LFE", "BL", "BR"].index(channel)] = tone(1, RATE)
    path = write(tmp_path / "a.flac", channels, "flac", RATE, "5.1")
    assert level(decode(path).samples) == pytest.approx(share * level(tone(1, RATE)), abs=10)


@pytest.mark.parametrize("channels", range(1, 9))
def test_channels_without_position_are_averaged(tmp_path, channels):
    samples = np.zeros((RATE, channels), np.int16)
    samples[:, -1] = tone(1, RATE)
    path = wav(tmp_path / "a.wav", samples)
    np.testing.assert_allclose(decode(path).samples, tone(1, RATE) / channels, atol=1)


@pytest.mark.parametrize("codec", ["pcm_u8", "pcm_s32le", "pcm_f32le", "pcm_f64le"])
def test_mean_of_channels_does_not_depend_on_sample_format(tmp_path, codec):
    channels = np.zeros((3, RATE), np.int16)
    channels[2] = tone(1, RATE, amplitude=30000)
    path = write(tmp_path / "a.wav", channels, codec, RATE, "3 channels")
    np.testing.assert_allclose(
        decode(path).samples, channels[2] / 3, atol=1 if codec != "pcm_u8" else 256
    )


@pytest.mark.parametrize("layout", ["stereo", "5.1", "7.1"])
@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_full_scale_in_every_channel_neither_overflows_nor_is_attenuated(tmp_path, layout, rate):
    square = np.where(np.arange(rate) // (rate // 50) % 2, 32767, -32768).astype(np.int16)
    channels = np.tile(square, (av.AudioLayout(layout).nb_channels, 1))
    path = write(tmp_path / "a.flac", channels, "flac", rate, layout)
    samples = decode(path).samples.astype(int)
    assert level(samples) > 32000
    assert np.sum(np.diff(np.sign(samples)) != 0) == 49  # an overflow would change the sign


@pytest.mark.parametrize("seconds", [0.25, 0.5])
def test_long_recording_is_capped_and_reports_its_length(files, seconds):
    for name in ("film.mp4", "disc.mp3"):
        uncapped, clip = decode(files[name]), decode(files[name], max_seconds=seconds)
        assert clip.capped
        assert clip.seconds == uncapped.seconds
        np.testing.assert_array_equal(clip.samples, uncapped.samples[: round(seconds * RATE)])


def test_cut_is_capped_from_its_start(files):
    clip = decode(files["disc.flac"], start=2, end=5, max_seconds=1)
    samples = decode(files["disc.flac"]).samples
    np.testing.assert_array_equal(clip.samples, samples[2 * RATE : 3 * RATE])
    assert (clip.seconds, clip.capped) == (3, True)


@pytest.mark.parametrize(("max_seconds", "capped"), [(0.999, True), (1, False), (1e9, False)])
def test_recording_of_exactly_max_seconds_is_not_capped(tmp_path, max_seconds, capped):
    clip = decode(wav(tmp_path / "a.wav", tone(1, RATE)), max_seconds=max_seconds)
    assert clip.capped == capped
    assert clip.seconds == 1


@pytest.mark.parametrize(("count", "rate"), [(1, RATE), (1024, RATE), (3072, 48_000)])
def test_very_short_recordings_are_decoded(tmp_path, count, rate):
    samples = np.full(count, 1000, np.int16)
    clip = decode(wav(tmp_path / "a.wav", samples, rate))
    assert len(clip.samples) == count * RATE // rate


def test_three_blocks_of_aac_are_decoded(tmp_path):
    path = write(tmp_path / "a.mp4", tone(0.064, 48_000)[None], "aac", 48_000, "mono")
    assert decode(path).seconds == pytest.approx(0.064, abs=0.022)


def test_stream_may_change_its_format(tmp_path):
    parts = [
        write(
            tmp_path / f"{rate}.aac",
            np.tile(tone(1, rate), (channels, 1)),
            "aac",
            rate,
            layout,
            format="adts",
        ).read_bytes()
        for rate, channels, layout in ((48_000, 2, "stereo"), (22_050, 1, "mono"))
    ]
    clip = decode(b"".join(parts))
    part_samples = [decode(part).samples for part in parts]
    assert clip.seconds == pytest.approx(sum(map(len, part_samples)) / RATE, abs=0.1)
    assert peak_frequency(clip.samples[-RATE // 2 :]) == pytest.approx(440, abs=2)


def write_broken_files(folder: pathlib.Path, files: dict[str, pathlib.Path]) -> dict[str, tuple]:
    """Writes files that cannot be decoded; returns sources and expected reasons by name."""

    def write_bytes(name: str, content: bytes) -> pathlib.Path:
        (folder / name).write_bytes(content)
        return folder / name

    film = files["film.mp4"].read_bytes()
    header = wav(folder / "header.wav", np.zeros(0, np.int16))
    pipe = folder / "pipe.wav"
    os.mkfifo(pipe)
    silent = write(folder / "silent.mp4", np.zeros((0, 0)), "", 0, "", with_picture=True)
    return {
        "missing": (folder / "missing.wav", Reason.MISSING),
        "inside a file": (header / "a.wav", Reason.MISSING),
        "folder": (folder, Reason.UNREADABLE),
        "no path": ("a\0b.wav", Reason.UNREADABLE),
        "pipe": (pipe, Reason.UNREADABLE),
        "empty": (write_bytes("empty.wav", b""), Reason.EMPTY),
        "no bytes": (b"", Reason.EMPTY),
        "text": (write_bytes("text.wav", b"This is a text.\nNot a sound.\n"), Reason.FORMAT),
        "noise": (write_bytes("noise.mp4", bytes(range(1, 256)) * 9), Reason.FORMAT),
        "truncated": (write_bytes("truncated.mp4", film[: len(film) // 2]), Reason.FORMAT),
        "web": (write_bytes("list.wav", b"#EXTM3U\n#EXTINF:9,\nhttp://localhost:9/a.wav\n"), None),
        "no audio": (silent, Reason.NO_AUDIO),
        "no samples": (header, Reason.NO_SAMPLES),
    }


BROKEN = (
    "missing",
    "inside a file",
    "folder",
    "no path",
    "pipe",
    "empty",
    "no bytes",
    "text",
    "noise",
    "truncated",
    "web",
    "no audio",
    "no samples",
)


@pytest.mark.parametrize("name", BROKEN)
def test_undecodable_source_raises_one_error_with_its_reason(tmp_path, capfd, files, name):
    source, reason = write_broken_files(tmp_path, files)[name]
    with pytest.raises(AudioError) as caught:
        decode(source)
    error = caught.value
    assert reason in (None, error.reason)
    assert isinstance(error, InputError)
    if name != "no bytes":
        assert str(error).startswith(f"{source}: {error.reason}")
    assert "\n" not in str(error)
    unpickled = pickle.loads(pickle.dumps(error))
    assert (str(unpickled), unpickled.reason) == (str(error), error.reason)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("start", "end"), [(-1, None), (2, 1), (1, 1), (float("nan"), None), (0, float("nan")), (7, 9)]
)
def test_cut_outside_recording_is_refused(files, start, end):
    for name in ("disc.flac", "film.mp4", "disc.mp3"):
        with pytest.raises(AudioError) as caught:
            decode(files[name], start=start, end=end)
        assert caught.value.reason == Reason.RANGE


@pytest.mark.parametrize("start", [None, 239])
def test_discarded_samples_take_no_memory(tmp_path, start):
    path = wav(tmp_path / "a.wav", np.ones(240 * RATE, np.int16))
    decode(path, end=1)  # loads libraries before memory is traced
    tracemalloc.start()
    clip = decode(path, start=start, max_seconds=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert clip.capped == (start is None)
    assert peak < 2e6 < path.stat().st_size


@pytest.mark.parametrize("max_seconds", [0, -1, float("nan")])
def test_nonpositive_max_seconds_is_refused(files, max_seconds):
    with pytest.raises(ValueError, match="max_seconds"):
        decode(files["mono.wav"], max_seconds=max_seconds)
    with pytest.raises(ValueError, match="max_seconds"):
        decode_many([], num_workers=0, max_seconds=max_seconds)


def test_damaged_recording_is_decoded_partially_and_marked(tmp_path, capfd):
    options = {"movflags": "faststart"}
    path = tmp_path / "a.mp4"
    write(path, tone(4, 48_000)[None], "aac", 48_000, "mono", options=options)
    path.write_bytes(path.read_bytes()[:-9000])
    clip = decode(path)
    assert clip.damaged
    assert 1 < clip.seconds < 3.9

    write(tmp_path / "a.flac", tone(4, RATE)[None], "flac", RATE, "mono")
    content = bytearray((tmp_path / "a.flac").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = bytes(4000)
    clip = decode(bytes(content))
    assert clip.damaged
    assert clip.seconds == 4 and clip.notes[0].endswith(" s missing")
    assert peak_frequency(clip.samples[-RATE // 2 :]) == pytest.approx(440, abs=2)

    content = wav(tmp_path / "a.wav", tone(4, RATE)).read_bytes()
    clip = decode(content[: len(content) // 2])
    assert clip.damaged
    assert clip.seconds == pytest.approx(2, abs=0.01)
    assert not decode(content[: len(content) // 2], end=1).damaged
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("size", [0, 0x7FFF_FFFF, 0x7FFF_F000, 0xFFFF_FFFF])
def test_wav_file_of_open_length_is_not_damaged(tmp_path, size):
    content = bytearray(wav(tmp_path / "a.wav", tone(1, RATE)).read_bytes())
    content[40:44] = size.to_bytes(4, "little")
    clip = decode(bytes(content))
    assert (clip.seconds, clip.damaged) == (1, False)


@pytest.fixture
def requests(tmp_path, files) -> list[DecodeRequest]:
    """Returns requests for recordings, segments of recordings, and broken files."""
    broken_files = write_broken_files(tmp_path, files)
    return [
        *(DecodeRequest(path) for path in files.values()),
        *(DecodeRequest(broken_files[name][0]) for name in BROKEN),
        DecodeRequest(files["disc.flac"], start=1, end=2),
        DecodeRequest(files["disc.flac"].read_bytes()),
        DecodeRequest(files["disc.flac"], start=9),
    ]


def comparable(result: Clip | AudioError) -> tuple:
    if isinstance(result, AudioError):
        return (str(result), result.reason)
    return (result.samples.tobytes(), result.seconds, result.capped, result.damaged)


def test_parallel_results_equal_serial_results_in_order(requests, capfd):
    serial = [comparable(result) for result in decode_many(requests, num_workers=0, max_seconds=2)]
    parallel = decode_many(iter(requests), num_workers=2, max_seconds=2)
    assert [comparable(result) for result in parallel] == serial
    assert capfd.readouterr().err == ""


def crash_at_second_cut(requests, max_seconds: float | None) -> list[Clip | AudioError]:
    if any(request.start == 2 for request in requests):
        os.kill(os.getpid(), signal.SIGKILL)
    return audio._decode_cuts(requests, max_seconds)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_crash_of_decoder_is_an_error_of_its_recording_only(files, monkeypatch, num_workers):
    monkeypatch.setattr(audio, "_decode_cuts", crash_at_second_cut)
    requests = [DecodeRequest(files["disc.flac"], start, start + 1) for start in (1, 2, 3, 4)]
    results = list(decode_many(requests, num_workers=num_workers))
    assert [type(result) for result in results] == [Clip, AudioError, Clip, Clip]
    assert results[1].reason == Reason.CRASH
    assert str(files["disc.flac"]) in str(results[1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_number_of_requests_taken_ahead_is_bounded(files, num_workers):
    num_taken = 0

    def requests():
        nonlocal num_taken
        while num_taken < 30:
            num_taken += 1
            yield DecodeRequest(files["mono.wav"])

    for index, _ in enumerate(decode_many(requests(), num_workers=num_workers)):
        assert num_taken - index <= max(1, QUEUED_PER_WORKER * num_workers)
    assert num_taken == 30


def loaded_modules(requests, max_seconds: float | None) -> list[list[str]]:
    decode(requests[0].source, max_seconds=max_seconds)
    return [sorted(sys.modules)]


def test_pyav_is_imported_only_in_decoding_process(files):
    program = (
        "import sys\n"
        "from mister_jax.data import audio, workers\n"
        "assert 'av' not in sys.modules\n"
        "request = audio.DecodeRequest(sys.argv[1])\n"
        "list(audio.decode_many([request], num_workers=1))\n"
        "assert 'av' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, files["mono.wav"]], cwd=ROOT, check=True)


def test_workers_import_neither_jax_nor_tensorflow(files, monkeypatch):
    monkeypatch.setattr(audio, "_decode_cuts", loaded_modules)
    (modules,) = decode_many([DecodeRequest(files["mono.wav"])], num_workers=1)
    assert "av" in modules
    assert not {"jax", "flax", "tensorflow"} & set(modules)


def test_encode_wav_refuses_other_dtypes_and_shapes(tmp_path):
    for samples in (np.zeros(3), np.zeros((2, 2, 2), np.int16)):
        with pytest.raises(ValueError, match="allowed: int16"):
            audio.encode_wav(tmp_path / "a.wav", samples)


def test_documentation_lists_formats():
    page = (ROOT / "docs" / "your_own_data.md").read_text()
    for name, (codec, rate, layout) in FORMATS.items():
        assert f"| `{name}` | {codec} | {rate} | {layout} |\n" in page


@pytest.mark.parametrize("name", FORMATS)
def test_streamed_cuts_equal_decoded_cuts(files, name):
    intervals = [(0, 1), (0.5, 3), (0.5, 0.7), (2.9, 4), (5.5, 6), (6, 9), (30, 31)]
    requests = [DecodeRequest(files[name], *interval) for interval in intervals]
    *clips, error = audio.stream_cuts(requests)
    for (start, end), clip in zip(intervals, clips, strict=False):
        expected = decode(files[name], start=start, end=end)
        np.testing.assert_allclose(
            clip.samples, expected.samples, atol=100 if "aac" in FORMATS[name] else 1
        )
        assert (clip.seconds, clip.notes) == (expected.seconds, expected.notes)
    assert error.reason == Reason.RANGE


def test_streamed_cuts_are_read_once_and_released(tmp_path, monkeypatch):
    path = wav(tmp_path / "long.wav", tone(600, RATE))
    readers = []
    monkeypatch.setattr(
        audio, "AudioReader", lambda *args: readers.append(args) or audio_reader.AudioReader(*args)
    )
    requests = [DecodeRequest(path, start, start + 10) for start in range(0, 600, 10)]
    tracemalloc.start()
    assert sum(len(clip.samples) for clip in audio.stream_cuts(requests)) == 600 * RATE
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(readers) == 1
    assert peak < 100 * RATE * 2, "bytes of 100 s"


def test_streamed_cuts_must_be_sorted(files):
    requests = [DecodeRequest(files["mono.wav"], start, 6) for start in (3, 2)]
    with pytest.raises(ValueError, match="not sorted"):
        list(audio.stream_cuts(requests))


def test_container_states_length_and_channels(files):
    assert audio.container_seconds(files["mono.wav"]) == pytest.approx(6.5, abs=0.05)
    assert audio.num_channels(files["mono.wav"]) == 1
    for name in files:
        assert audio.container_seconds(files[name]) == pytest.approx(6.5, abs=0.2)
