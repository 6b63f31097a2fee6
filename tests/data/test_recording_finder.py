"""Recordings are found in folders whose layout differs from the metadata."""

import pytest

from mister_jax.data.corpora.recording_finder import find_recordings, list_recordings
from mister_jax.errors import InputError


def write_files(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return folder


@pytest.mark.parametrize(
    "path", ["downloads/urdu/Sad/S1.wav", "urdu/Sad/S1.wav", "Sad/S1.flac", "S1.FLAC", "x/y/S1.mp3"]
)
def test_the_end_of_a_path_identifies_its_recording(tmp_path, path):
    write_files(tmp_path, path, "._S1.wav", "__MACOSX/S1.wav", ".hidden/S1.wav", "S1.txt")
    assert find_recordings(tmp_path, ["downloads/urdu/Sad/S1.wav"]) == {
        "downloads/urdu/Sad/S1.wav": tmp_path / path
    }


def test_a_recording_of_another_speaker_is_not_taken(tmp_path):
    write_files(tmp_path, "liu/neutral/239.wav")
    paths = ["downloads/casia/liu/neutral/239.wav", "downloads/casia/wang/neutral/239.wav"]
    assert find_recordings(tmp_path, paths) == {paths[0]: tmp_path / "liu/neutral/239.wav"}


def test_the_longest_end_and_the_same_extension_are_preferred(tmp_path):
    write_files(tmp_path, "a/1.wav", "b/1.wav", "a/1.flac")
    assert find_recordings(tmp_path, ["x/a/1.wav"]) == {"x/a/1.wav": tmp_path / "a/1.wav"}


def test_points_and_decomposed_accents_in_names_are_kept(tmp_path):
    write_files(tmp_path, "m3.s_nie_5.flac", "cafe\u0301/s19_an_1.avi")
    assert len(find_recordings(tmp_path, ["m3.s_nie_5.wav", "caf\u00e9/s19_an_1.avi"])) == 2
    assert not find_recordings(tmp_path, ["m3.s_nie.wav", "m3.wav"])


def test_two_equal_matches_are_an_error(tmp_path):
    write_files(tmp_path, "first/1.flac", "second/1.flac")
    with pytest.raises(
        InputError, match=r"x/1\.wav: matches \S+/first/1.flac and \S+/second/1.flac; n"
    ):
        find_recordings(tmp_path, ["x/1.wav"])


def test_links_are_followed_once(tmp_path):
    write_files(tmp_path / "corpus", "a/1.wav")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/link").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus/a/loop").symlink_to(tmp_path / "root")
    assert list(list_recordings(tmp_path / "root")) == [tmp_path / "root/link/a/1.wav"]
