"""Times match those of a media player: gaps, late audio, channels, segments read in one pass."""

import pathlib
import time

import av
import numpy as np
import pytest

from mister_jax.data import audio
from mister_jax.data.audio import AudioError, DecodeRequest, Reason, decode, decode_many

RATE = audio.SAMPLE_RATE
CODECS = {"webm": "libopus", "mkv": "aac", "ts": "aac", "mp4": "aac", "mka": "flac", "mov": "aac"}


def staircase(seconds: int, rate: int) -> np.ndarray:
    """Returns samples [N] int16 whose second k is a tone of 300 + 200 k Hz."""
    second = np.arange(rate) / rate
    tones = [np.sin(2 * np.pi * (300 + 200 * k) * second) for k in range(seconds)]
    return np.rint(8000 * np.concatenate(tones)).astype(np.int16)


def peak_frequency(samples: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum)) * RATE / len(samples)


def write_staircase(path, *, gap=(), late=0.0, picture=False, seconds=8, rate=48_000):
    """Writes a staircase of tones without the packets in a gap.

    Args:
        path: File, whose suffix selects format and codec.
        gap: Start and end of the gap in seconds of the player's clock.
        late: Seconds by which audio starts after the video.
        picture: Whether to add a video of the same length.
        seconds: Length of the staircase.
        rate: Sample rate in Hz.
    """
    with av.open(str(path), "w") as container:
        sound = container.add_stream(CODECS[path.suffix[1:]], rate=rate, layout="mono")
        if picture:
            video = container.add_stream("mpeg4", rate=5)
            video.width = video.height = 32
            video.pix_fmt = "yuv420p"
        samples = staircase(seconds, rate)[round(late * rate) :]
        packets = []
        for start in range(0, len(samples), rate // 50):
            block = samples[None, start : start + rate // 50]
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
            frame.sample_rate = rate
            frame.pts = start + round(late * rate)
            packets += sound.encode(frame)
        packets += sound.encode(None)
        if picture:
            for index in range(5 * seconds):
                image = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
                image.pts = index
                packets += video.encode(image)
            packets += video.encode(None)
        packets.sort(key=lambda packet: packet.dts * packet.time_base)
        for packet in packets:
            is_sound = packet.stream.index == sound.index
            if not (is_sound and gap and gap[0] <= packet.pts * packet.time_base < gap[1]):
                container.mux(packet)
    return path


@pytest.fixture(scope="module")
def files_with_gap(tmp_path_factory):
    """Returns files without audio from 2 s to 4 s, by suffix."""
    folder = tmp_path_factory.mktemp("gaps")
    return {
        ending: write_staircase(folder / f"gap.{ending}", gap=(2, 4))
        for ending in CODECS
        if ending != "ts"
    } | {"ts": write_staircase(folder / "gap.ts", gap=(2, 4), picture=True)}


@pytest.mark.parametrize("ending", CODECS)
def test_gap_between_time_stamps_is_silence(files_with_gap, ending):
    clip = decode(files_with_gap[ending])
    assert clip.seconds == pytest.approx(8, abs=0.06)
    assert any(note in ("2.0 s missing", "1.9 s missing") for note in clip.notes), clip.notes
    for second in (0, 1, 4, 5, 6, 7):
        frequency = peak_frequency(
            clip.samples[int((second + 0.25) * RATE) : int((second + 0.75) * RATE)]
        )
        assert frequency == pytest.approx(300 + 200 * second, abs=5)
    assert np.abs(clip.samples[int(2.3 * RATE) : int(3.7 * RATE)]).max() < 50


@pytest.mark.parametrize("ending", CODECS)
def test_cut_after_gap_equals_part_of_entire_recording(files_with_gap, ending):
    clip = decode(files_with_gap[ending])
    for start, end in ((5.25, 5.75), (2.5, 3.5), (3.5, 4.5), (1.0, 6.0)):
        cut = decode(files_with_gap[ending], start=start, end=end)
        expected = clip.samples[round(start * RATE) : round(end * RATE)]
        # AAC decoders add synthetic noise, which depends on where decoding starts.
        tolerance = 100 if CODECS[ending] == "aac" else 1
        np.testing.assert_allclose(cut.samples, expected, atol=tolerance)
    assert peak_frequency(
        decode(files_with_gap[ending], start=5.25, end=5.75).samples
    ) == pytest.approx(1300, abs=5)
    assert decode(files_with_gap[ending], start=5.25, end=5.75).notes == ()


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts", "mov"])
def test_audio_that_starts_after_video_is_preceded_by_silence(tmp_path, ending):
    path = write_staircase(tmp_path / f"late.{ending}", late=1.0, picture=True)
    clip = decode(path)
    assert clip.notes == ("audio starts 1.0 s late",)
    assert clip.seconds == pytest.approx(8, abs=0.06)
    assert not clip.samples[: int(0.9 * RATE)].any()
    for start in (1.25, 5.25):
        cut = decode(path, start=start, end=start + 0.5)
        assert peak_frequency(cut.samples) == pytest.approx(300 + 200 * int(start), abs=5)
        expected = clip.samples[int(start * RATE) : int((start + 0.5) * RATE)]
        np.testing.assert_allclose(cut.samples, expected, atol=100)
    assert len(decode(path, start=0.25, end=0.5).samples) == RATE // 4


def test_audio_without_video_begins_with_its_first_sample(tmp_path):
    # Players do not wait for a video that does not exist.
    clip = decode(write_staircase(tmp_path / "late.mp4", late=1.0))
    assert clip.notes == ()
    assert peak_frequency(clip.samples[RATE // 4 : RATE * 3 // 4]) == pytest.approx(500, abs=5)


def test_late_packets_do_not_shift_later_audio(tmp_path):
    path = tmp_path / "network.mka"
    samples, last = staircase(8, RATE), -1
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for start in range(0, len(samples), RATE // 50):
            block = samples[None, start : start + RATE // 50]
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
            frame.sample_rate, frame.pts = RATE, start
            for packet in stream.encode(frame):
                # Once a second, a packet is 80 ms late, and the packets after it catch up.
                late = RATE * 8 // 100 if start % RATE == 0 and start else 0
                last = max(last + 1, packet.pts + late)
                packet.pts = packet.dts = last
                container.mux(packet)
    clip = decode(path)
    assert clip.seconds == pytest.approx(8, abs=0.1)
    assert peak_frequency(clip.samples[int(7.25 * RATE) : int(7.75 * RATE)]) == pytest.approx(
        1700, abs=5
    )


def test_clock_reset_is_not_filled_with_silence(tmp_path):
    path = tmp_path / "joined.mka"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=RATE, layout="mono")
        for second in range(4):
            block = staircase(4, RATE)[None, second * RATE : (second + 1) * RATE]
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
            frame.sample_rate = RATE
            frame.pts = second * RATE + (10 * 3600 * RATE if second > 1 else 0)
            for packet in stream.encode(frame):
                container.mux(packet)
        container.mux(stream.encode(None))
    clip = decode(path)
    assert clip.seconds == pytest.approx(4, abs=0.3)
    assert any("jump by 36000 s" in note for note in clip.notes)


@pytest.fixture(scope="module")
def stereo(tmp_path_factory):
    """Returns a file with a tone of 500 Hz on the left and of 900 Hz on the right."""
    time = np.arange(2 * RATE) / RATE
    tones = [np.rint(8000 * np.sin(2 * np.pi * pitch * time)) for pitch in (500, 900)]
    path = tmp_path_factory.mktemp("stereo") / "call.wav"
    audio.encode_wav(path, np.stack(tones, axis=1).astype(np.int16))
    return path


@pytest.mark.parametrize(
    ("channel", "pitch"), [("left", 500), ("right", 900), (0, 500), (1, 900), ("1", 900)]
)
def test_selected_channel_is_read(stereo, channel, pitch):
    samples = decode(stereo, channel=channel).samples
    time = np.arange(2 * RATE) / RATE
    np.testing.assert_array_equal(samples, np.rint(8000 * np.sin(2 * np.pi * pitch * time)))


def test_missing_channel_is_refused(stereo):
    with pytest.raises(AudioError, match=r"no such channel \(2 of 2 channels\)") as caught:
        decode(stereo, channel=2)
    assert caught.value.reason == Reason.NO_CHANNEL
    for invalid in ("middle", -1, 1.5, True, None):
        with pytest.raises(ValueError, match="allowed: mix, left, right, or the index"):
            decode(stereo, channel=invalid)


def test_unicode_form_of_file_name_does_not_matter(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    folder = tmp_path / decomposed
    folder.mkdir()
    audio.encode_wav(folder / f"{decomposed}.wav", np.ones(RATE, np.int16))
    for name in (composed, decomposed):
        assert decode(tmp_path / composed / f"{name}.wav").seconds == 1
    with pytest.raises(AudioError, match="no such file"):
        decode(folder / "caf\u00e8.wav")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_cuts_of_one_recording_equal_separately_decoded_cuts(files_with_gap, stereo, num_workers):
    spans = ((5.0, 6.0), (0.5, 1.5), (1.0, 4.5), (7.5, 9.0), (9.0, 9.5), (3.0, 2.0), (0.0, 0.1))
    requests = [DecodeRequest(files_with_gap["mka"], *span) for span in spans]
    requests += [
        DecodeRequest(stereo, 0.5, 1.0, channel) for channel in ("left", "right", "mix", 5)
    ]
    results = list(decode_many(requests, num_workers=num_workers, max_seconds=2.0))
    for request, result in zip(requests, results, strict=True):
        (separate,) = decode_many([request], num_workers=0, max_seconds=2.0)
        if isinstance(separate, AudioError):
            assert str(result) == str(separate)
        else:
            np.testing.assert_array_equal(result.samples, separate.samples)
            assert (result.seconds, result.capped) == (separate.seconds, separate.capped)
            assert (result.damaged, result.notes) == (separate.damaged, separate.notes)


def test_many_cuts_take_one_pass(tmp_path):
    path = tmp_path / "long.ogg"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libopus", rate=48_000, layout="mono")
        for minute in range(2):
            block = staircase(60, 48_000)[None]
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
            frame.sample_rate, frame.pts = 48_000, minute * 60 * 48_000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    starts = np.linspace(60, 118, 30).tolist()
    start = time.process_time()
    decode(path)
    one_pass = time.process_time() - start
    requests = [DecodeRequest(path, begin, begin + 1) for begin in starts]
    start = time.process_time()
    clips = list(decode_many(requests, num_workers=0))
    assert time.process_time() - start < 4 * one_pass  # separate decoding takes over 10
    assert all(len(clip.samples) == RATE for clip in clips)


def test_documentation_lists_containers():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "your_own_data.md").read_text()
    for container, codec in CODECS.items():
        assert f"| {container} | {codec} |\n" in page
