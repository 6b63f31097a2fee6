"""Writes minimal corpora in their released layouts, with the irregularities of the releases."""

import csv

import h5py
import numpy as np

from mister_jax.data.corpora import mosi

IEMOCAP_HEADER = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
# Turns of each dialogue, not in time order: start, end, suffix of the id, label.
IEMOCAP = {
    "Ses01F_impro01": [
        (6.0, 7.0, "M000", "fru"),
        (1.5, 3.0, "F000", "neu"),
        (3.5, 4.0, "FXX", "neu"),
        (4.0, 5.0, "XX0", "xxx"),
    ],
    "Ses01M_impro01": [(0.5, 1.0, "F000", "hap")],
    "Ses02F_script01_1": [
        (9.0, 10.0, "F001", "exc"),
        (2.0, 4.0, "M001", "xxx"),
        (4.0, 5.0, "MXX0", "neu"),
        (5.0, 6.0, "F000", "ang"),
    ],
    "Ses03M_impro05a": [
        (1.0, 2.0, "F003", "sad"),
        (3.0, 4.0, "M002", "oth"),
        (5.0, 6.0, "M003", "sur"),
        (7.0, 8.0, "M004", "fea"),
        (9.0, 9.5, "M005", "dis"),
    ],
    "Ses04F_impro07": [(0.0, 1.0, "M000", "exc")],
    "Ses05F_script03_2": [(12.5, 13.0, "M010", "hap"), (3.25, 4.0, "F002", "ang")],
}


def write_iemocap(root, write_wav):
    for name, turns in IEMOCAP.items():
        session = root / f"Session{name[4]}"
        annotation = session / "dialog/EmoEvaluation" / f"{name}.txt"
        transcript = session / "dialog/transcriptions" / f"{name}.txt"
        for path in (annotation, transcript):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f"._{name}.txt").write_bytes(b"\0\5\x16\7\xff")
        blocks = [
            f"[{start:.4f} - {end:.4f}]\t{name}_{turn}\t{label}\t[2.5, 2.5, 2.5]\n"
            "C-E1:\tNeutral;\t()\nA-E1:\tval 3; act 3; dom 3;\t()\n"
            for start, end, turn, label in turns
        ]
        annotation.write_text(IEMOCAP_HEADER + "\n".join(blocks))
        lines = [
            f"{name}_{turn} [{start:08.4f}-{end:08.4f}]: Words of {turn}."
            for start, end, turn, _ in turns
        ]
        transcript.write_text("\n".join([*lines, "M: (laughs)"]) + "\n")
        for _, _, turn, _ in turns:
            wav = session / "sentences/wav" / name / f"{name}_{turn}.wav"
            if turn != "M002":  # A missing recording.
                write_wav(wav)
            wav.with_name(f"._{wav.name}").write_bytes(b"\0\5")
    (root / "Session4/sentences/wav/Ses04F_impro07/Ses04F_impro07_M000.wav").write_bytes(b"")


MELD_COLUMNS = [
    "Sr No.",
    "Utterance",
    "Speaker",
    "Emotion",
    "Sentiment",
    "Dialogue_ID",
    "Utterance_ID",
    "Season",
    "Episode",
    "StartTime",
    "EndTime",
]
# Split, dialogue, utterance, text, emotion. Dialogue ids are not contiguous and not sorted.
MELD = [
    ("train", 61, 3, "Third.", "joy"),
    ("train", 61, 0, "It\x92s first.", "neutral"),
    ("train", 59, 0, "Alone \x96 caf\xe9.", "fear"),
    ("train", 125, 3, "Unreadable.", "anger"),
    ("dev", 110, 7, "Absent.", "sadness"),
    ("dev", 110, 8, "There.", "surprise"),
    ("test", 38, 4, "Very long.", "disgust"),
    ("test", 38, 5, "Alone \x96 caf\xe9.", "neutral"),
    ("test", 220, 0, "Very short.", "joy"),
]
MELD_FOLDERS = {
    "train": "train_splits",
    "dev": "dev_splits_complete",
    "test": "output_repeated_splits_test",
}


def write_meld_csv(root, rows, names=("train", "dev", "test"), start="00:00:01,500"):
    for name in names:
        path = root / f"{name}_sent_emo.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(MELD_COLUMNS)
            for split, dialogue, utterance, text, emotion in rows:
                if split == name:
                    cells = [1, text, "Someone", emotion, "neutral", dialogue, utterance, 8, 21]
                    writer.writerow([*cells, start, "00:00:02,25"])


def write_meld(root, write_mp4):
    write_meld_csv(root, MELD)
    for split, dialogue, utterance, *_ in MELD:
        clip = root / split / MELD_FOLDERS[split] / f"dia{dialogue}_utt{utterance}.mp4"
        if clip.name == "dia110_utt7.mp4":
            continue
        if clip.name == "dia125_utt3.mp4":
            clip.parent.mkdir(parents=True, exist_ok=True)
            clip.write_bytes(b"\0" * 500)
        elif clip.name == "dia38_utt4.mp4":
            write_mp4(clip, 305, channels=1)
        elif clip.name == "dia220_utt0.mp4":
            write_mp4(clip, 0.064)
        else:
            write_mp4(clip, 0.5, channels=6 if dialogue == 61 else 2)
    test_clips = root / "test" / MELD_FOLDERS["test"]
    write_mp4(test_clips / "final_videos_testdia38_utt5.mp4", 1.5)
    # This clip has no row in the CSV file.
    write_mp4(root / "train" / MELD_FOLDERS["train"] / "dia59_utt1.mp4", 0.2)
    (test_clips / "._dia38_utt4.mp4").write_bytes(b"\0\5\x16\7")
    # Archives from macOS contain these folders, which sort before the folders of clips.
    for folder in MELD_FOLDERS.values():
        (root / "__MACOSX" / folder).mkdir(parents=True)


# One video per split. The first has more than nine segments, to test that the order is numeric.
MOSI = {
    "03bSnISJMiM": [2.4, 0.0, -0.8, 1.0, -3.0, 3.0, 0.2, -0.2, 1.8, -1.2, 0.6],
    "_dI--eQ6qVU": [0.0],
    "tStelxIAHjw": [-1.0, 1.0],
}


def write_mosi_labels(path, scores, group="Opinion Segment Labels"):
    with h5py.File(path, "w") as file:
        data = file.create_group(f"{group}/data")
        file.create_group(f"{group}/metadata")
        for video, values in scores.items():
            starts = np.arange(len(values), dtype=float)
            data[f"{video}/features"] = np.array(values)[:, None]
            data[f"{video}/intervals"] = np.stack([starts, starts + 0.9], axis=1)


def write_mosi(root, write_wav):
    for video, scores in MOSI.items():
        numbers = range(1, len(scores) + 1)
        for number in numbers:
            if (video, number) != ("tStelxIAHjw", 2):
                write_wav(root / mosi.AUDIO / f"{video}_{number}.wav", 0.2)
        transcript = root / mosi.TRANSCRIPTS / f"{video}.annotprocessed"
        transcript.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{number}_DELIM_SEGMENT {number}" for number in numbers]
        transcript.write_text("\n".join(lines) + "\n")
    write_mosi_labels(root / mosi.LABELS, MOSI)
