"""Recordings in the formats of the corpora, and small corpora."""

import pathlib

import av
import numpy as np
import pytest

from mister_jax.data.audio import SAMPLE_RATE, encode_wav
from tests.data.corpora import write_iemocap, write_meld


def tone(seconds: float, rate: int, channels: int, hertz: float = 220.0) -> np.ndarray:
    """Returns a sine wave [channels, S] int16."""
    time = np.arange(round(seconds * rate)) / rate
    wave = (8000 * np.sin(2 * np.pi * hertz * time)).astype(np.int16)
    return np.tile(wave, (channels, 1))


@pytest.fixture(scope="session")
def write_wav():
    """Function that writes a 16 kHz mono tone to a path."""

    def write(path: pathlib.Path, seconds: float = 0.5) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        encode_wav(path, tone(seconds, SAMPLE_RATE, 1)[0])

    return write


@pytest.fixture(scope="session")
def write_mp4():
    """Function that writes a tone as AAC at 48 kHz to an mp4 file."""

    def write(path: pathlib.Path, seconds: float = 0.5, channels: int = 2) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        layout = {1: "mono", 2: "stereo", 6: "5.1"}[channels]
        samples = tone(seconds, 48_000, channels)
        with av.open(str(path), "w", format="mp4") as container:
            stream = container.add_stream("aac", rate=48_000, layout=layout)
            # The packed format interleaves the channels.
            frame = av.AudioFrame.from_ndarray(samples.T.reshape(1, -1), "s16", layout)
            frame.sample_rate = 48_000
            for packet in (*stream.encode(frame), *stream.encode(None)):
                container.mux(packet)

    return write


@pytest.fixture(scope="session")
def iemocap_folder(tmp_path_factory, write_wav):
    root = tmp_path_factory.mktemp("iemocap") / "IEMOCAP_full_release"
    write_iemocap(root, write_wav)
    return root


@pytest.fixture(scope="session")
def meld_folder(tmp_path_factory, write_mp4):
    root = tmp_path_factory.mktemp("MELD.Raw")
    write_meld(root, write_mp4)
    return root
