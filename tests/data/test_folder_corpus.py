"""Folders of recordings whose paths contain the emotion."""

import collections
import os
import pathlib

import pytest

from mister_jax.data.corpora.folder import PRESETS, PathPattern, read_folder
from mister_jax.errors import InputError


def write_files(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(path.encode())
    return folder


def labels(corpus):
    return {turn.id.partition("/")[0]: turn.label for _, turn in corpus.utterances()}


@pytest.mark.parametrize(
    ("pattern", "path", "fields"),
    [
        (
            *("{speaker}_{emotion}_{sentence}.wav", "EB0_anger_12.wav"),
            {"speaker": "EB0", "emotion": "anger", "sentence": "12"},
        ),
        (
            *("{speaker:2}{sentence:3}{emotion:1}{version}.wav", "wav/03a01Fa.wav"),
            {"speaker": "03", "sentence": "a01", "emotion": "F", "version": "a"},
        ),
        ("{emotion}/{speaker}_*.wav", "x/sad/S1_.wav", {"emotion": "sad", "speaker": "S1"}),
        ("{_:2}-{emotion}", "03-calm.flac", {"emotion": "calm"}),
        ("{speaker}.{emotion}_{_}.*", "m3.s_nie.wav", {"speaker": "m3", "emotion": "s"}),
        ("{emotion}_{_}.wav", "angry.wav", None),
        ("{emotion}_{_}.wav", "angry_1.mp3", None),
        ("{emotion}/{_}.wav", "1.wav", None),
        ("({emotion})+.wav", "(sad)+.wav", {"emotion": "sad"}),
    ],
)
def test_a_pattern_reads_the_fields_of_a_path(pattern, path, fields):
    assert PathPattern(pattern).fields(pathlib.PurePosixPath(path)) == fields


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{speaker}_{word}.wav", r"no \{emotion\}; needed: \{emotion\}, as in"),
        ("{speaker}{emotion}.wav", r"ambiguous at '\{emotion\}', which follows a field of any len"),
        ("{speaker}*{emotion}.wav", r"ambiguous at '\*'"),
        ("{emotion}_{emotion}.wav", "field 'emotion' is repeated; needed: each name once"),
        ("{emotion}_{audio}.wav", "field 'audio'; needed: emotion, speaker, dialogue"),
        ("{emotion}_{a b}.wav", "field 'a b'; needed: names of letters, digits and _"),
        ("{emotion:x}.wav", "length 'x'; needed: a number of characters"),
        ("{emotion:9999}.wav", "length '9999'; needed: a number of characters"),
        ("{emotion:0}.wav", "length '0'; needed: a number of characters"),
        ("{emotion.wav", "'{' without its pair; needed: names in braces"),
    ],
)
def test_an_invalid_pattern_is_an_error(pattern, message):
    with pytest.raises(InputError, match=message) as error:
        PathPattern(pattern)
    assert str(error.value).startswith(f"--pattern={pattern}: ")


def test_a_path_with_two_readings_is_an_error(tmp_path):
    write_files(tmp_path, "A_B_sad_1.wav")
    with pytest.raises(InputError, match=r"is ambiguous \(speaker=A, emotion=B, _1=sad_1 or speak"):
        read_folder(tmp_path, "{speaker}_{emotion}_{_1}.wav")


# Some recordings of each corpus, and the label and speaker of each.
RECORDINGS = {
    "nemo": {
        "samples/EB0_anger_1.wav": ("anger", "EB0"),
        "samples/WR0_surprised_64.wav": ("surprised", "WR0"),
        "samples/MP0_neutral_79.wav": ("neutral", "MP0"),
    },
    "emodb": {
        "wav/03a01Wa.wav": ("anger", "03"),
        "wav/08a02Lb.wav": ("boredom", "08"),
        "wav/09a04Ea.wav": ("disgust", "09"),
        "wav/10a05Aa.wav": ("fear", "10"),
        "wav/11a07Fa.wav": ("happiness", "11"),
        "wav/12b01Ta.wav": ("sadness", "12"),
        "wav/16b10Nc.wav": ("neutral", "16"),
    },
    "ravdess": {
        f"Actor_0{actor}/03-01-0{code}-01-02-01-0{actor}.wav": (label, f"0{actor}")
        for actor, (code, label) in enumerate(
            [
                *((1, "neutral"), (2, "calm"), (3, "happy"), (4, "sad"), (5, "angry")),
                *((6, "fearful"), (7, "disgust"), (8, "surprised")),
            ],
            start=1,
        )
    },
    "cremad": {
        "AudioWAV/1001_DFA_ANG_XX.wav": ("anger", "1001"),
        "AudioWAV/1002_IEO_DIS_HI.wav": ("disgust", "1002"),
        "AudioWAV/1003_IEO_FEA_LO.wav": ("fear", "1003"),
        "AudioWAV/1004_IEO_HAP_MD.wav": ("happy", "1004"),
        "AudioWAV/1005_IOM_NEU_XX.wav": ("neutral", "1005"),
        "AudioWAV/1040_ITH_SAD_X.wav": ("sad", "1040"),
    },
}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_reads_its_corpus(tmp_path, preset):
    recordings = RECORDINGS[preset]
    corpus = read_folder(write_files(tmp_path, *recordings, "._a.wav", "readme.txt"), preset)
    assert {
        str(pathlib.Path(turn.recording.source).relative_to(tmp_path)): (
            turn.label,
            turn.metadata["speaker"],
        )
        for _, turn in corpus.utterances()
    } == recordings
    assert all(corpus.splits.values())


def test_splits_are_random_by_speaker_and_unmatched_recordings_are_listed(tmp_path):
    write_files(
        tmp_path,
        *(
            f"S{speaker}_{code}_{number}.wav"
            for speaker in range(6)
            for code in "ah"
            for number in (1, 2)
        ),
        "noise.wav",
        "music.mp3",
    )
    pattern = "{speaker}_{emotion}_{take}.wav"
    label_map = {"a": "angry", "h": "happy"}
    with pytest.raises(InputError, match=r"no recording has the emotion zz; the file names have"):
        read_folder(tmp_path, pattern, label_map={"a": "angry", "zz": "happy"})
    corpus = read_folder(tmp_path, pattern, label_map=label_map, group_by="speaker", seed=3)
    assert corpus.class_names == ("angry", "happy")
    assert {split: size for split, (size, _) in corpus.sizes().items()} == {
        "train": 16,
        "validation": 4,
        "test": 4,
    }
    speakers = [
        {turn.metadata["speaker"] for dialogue in dialogues for turn in dialogue.utterances}
        for dialogues in corpus.splits.values()
    ]
    assert sum(map(len, speakers)) == len(set().union(*speakers)) == 6
    assert corpus.notes[0] == (
        "2 recordings do not match the pattern and are left out: music.mp3, noise.wav"
    )
    assert "columns kept as metadata, which no model reads: speaker, take" in corpus.notes
    assert labels(corpus)["S5_h_2"] == "happy"
    write_files(tmp_path, "another.wav")
    with pytest.raises(InputError, match=r"3 of 27 recordings do not match --pattern=\{speaker\}_"):
        read_folder(tmp_path, pattern)


def test_names_that_are_not_utf8_are_listed_or_an_error(tmp_path):
    write_files(tmp_path, *(f"S{number}_sad_1.wav" for number in range(10)))
    path = os.fsencode(tmp_path) + b"/caf\xe9.wav"
    try:
        pathlib.Path(os.fsdecode(path)).touch()
    except OSError:
        pytest.skip("the file system allows only UTF-8")
    corpus = read_folder(tmp_path, "{speaker}_{emotion}_{_}.wav")
    assert corpus.notes[0].endswith(r"left out: caf\udce9.wav")
    with pytest.raises(InputError, match=r"audio: 'caf.*'; allowed: text without null or invalid"):
        read_folder(tmp_path, "{emotion}")


def test_dialogues_splits_and_texts_in_paths(tmp_path):
    write_files(tmp_path, *(f"dev/d1/{turn}-sad-How_are_you.wav" for turn in (10, 9)))
    write_files(tmp_path, "train/d2/1-joy-Fine.wav", "eval/d3/1-joy-Bye.wav")
    corpus = read_folder(tmp_path, "{split}/{dialogue}/{utterance}-{emotion}-{text}.*")
    assert corpus.sizes() == {"train": (1, 1), "validation": (1, 2), "test": (1, 1)}
    (dialogue,) = corpus.splits["validation"]
    assert [turn.id for turn in dialogue.utterances] == ["d1/9", "d1/10"]
    assert dialogue.utterances[0].text == "How are you"


def test_copies_of_recordings_are_noted(tmp_path):
    for folder in ("Actor_01", "copy/Actor_01"):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("03-01-01-01-02-01-01.wav", "03-01-02-01-02-01-01.wav"):
            (tmp_path / folder / name).write_bytes(b"1")
    corpus = read_folder(tmp_path, "ravdess")
    assert corpus.notes[0].startswith("WARNING: 2 recordings have the name and size of another")
    counts = collections.Counter(turn.label for _, turn in corpus.utterances())
    assert counts == {"neutral": 2, "calm": 2}


def test_errors_say_what_is_allowed(tmp_path):
    with pytest.raises(
        InputError, match=r"--pattern=iemo; allowed: nemo, emodb, ravdess, cremad, "
    ):
        read_folder(tmp_path, "iemo")
    with pytest.raises(InputError, match=r"--pattern=; allowed: nemo"):
        read_folder(tmp_path, "")
    with pytest.raises(InputError, match="no recordings; needed: files such as"):
        read_folder(tmp_path, "nemo")
    with pytest.raises(InputError, match="no such folder; needed: a folder of recordings"):
        read_folder(tmp_path / "nowhere", "nemo")
    write_files(tmp_path, "03a01Xa.wav")
    with pytest.raises(
        InputError, match=r"03a01Xa.wav: emotion: 'X'; allowed: W, L, E, A, F, T, N"
    ):
        read_folder(tmp_path, "emodb")
    with pytest.raises(InputError, match=r"split: 'xa'; allowed: train, validation, test"):
        read_folder(tmp_path, "{emotion:5}{split}.wav")
    write_files(tmp_path, "03a01Xa.flac")
    with pytest.raises(InputError, match=r"03a01Xa.wav: utterance: repeats .*; needed: unique ids"):
        read_folder(tmp_path, "{speaker:2}{emotion}")
