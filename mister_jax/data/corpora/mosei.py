"""Reads CMU-MOSEI: video monologues on many topics, with sentiment scores (ACL 2018, P18-1208).

The release contains unsegmented recordings and transcripts of segments. The CMU Multimodal SDK
contains the labels. As in `mosi`, the two classes are scores in [-3, 0) and scores in [0, 3]. The
score and the intensities of six emotions are also stored.
"""

import collections
import pathlib
import re
from typing import ClassVar, NamedTuple

import numpy as np

from mister_jax.data.builder import CorpusConfig, DialogueBuilder
from mister_jax.data.corpora.cmu_sdk import read_sequence, read_standard_folds
from mister_jax.data.corpora.mosi import CLASS_NAMES
from mister_jax.data.corpora.text_files import read_any_text
from mister_jax.data.corpus import (
    Corpus,
    DecodeRequest,
    Dialogue,
    Utterance,
    existing_directory,
    find,
)
from mister_jax.data.labels import MAX_SCORE, MIN_SCORE
from mister_jax.data.schema import SPLITS
from mister_jax.errors import InputError

EMOTIONS = ("happy", "sad", "anger", "surprise", "disgust", "fear")
"""Emotions. A label contains the sentiment score, then the intensity (0 to 3) of each emotion."""

AUDIO, TRANSCRIPTS = "Raw/Audio/Full/WAV_16000", "Raw/Transcript/Segmented/Combined"
LABELS, FOLDS = "CMU_MOSEI_Labels.csd", "cmu_mosei_std_folds.py"
_SDK_FOLDER = "mmsdk/mmdatasdk/dataset/standard_datasets/CMU_MOSEI"
LAYOUT = f"a folder that contains {AUDIO}, {TRANSCRIPTS}, {LABELS} and the SDK's {FOLDS}"

# A label matches a segment of the transcript if the intersection over union of their times is at
# least this value.
_MIN_OVERLAP = 0.5
# At most one in `_MISSING_LIMIT` videos of a split may lack labels.
_MISSING_LIMIT = 10

_SEGMENT = re.compile(r"(.+?)___(\d+)___(-?[\d.]+)___(-?[\d.]+)___(.*)")


class _Segment(NamedTuple):
    """Segment of a transcript."""

    number: int
    start: float
    end: float
    text: str


def read_mosei(source: str | pathlib.Path, *, partial: bool = False) -> Corpus:
    """Reads the labels and transcripts of CMU-MOSEI and locates its recordings.

    Each segment of positive length in a transcript is an utterance. A segment without a label is
    unlabeled context. A label without a matching segment becomes an utterance without text. Videos
    without labels are left out.

    Args:
        source: Folder that contains `Raw`, the labels, and the SDK's file of splits.
        partial: Whether to allow splits in which many videos have no labels.

    Raises:
        InputError: A file is missing or cannot be used.
    """
    root = existing_directory(source, needed=LAYOUT)
    labels, folds = find(root, LABELS), _find_folds(root)
    transcripts = root / TRANSCRIPTS
    for path, name in ((labels, LABELS), (folds, FOLDS)):
        if path is None:
            raise InputError(f"{root}: no {name}; needed: {LAYOUT}")
    if not transcripts.is_dir():
        raise InputError(f"{root}: no {TRANSCRIPTS}; needed: {LAYOUT}")
    assert labels is not None and folds is not None
    split_of_video = read_standard_folds(folds)
    sequences = read_sequence(labels, 1 + len(EMOTIONS))
    splits: dict[str, list[Dialogue]] = {split: [] for split in SPLITS}
    counts: collections.Counter[str] = collections.Counter()
    for video, (features, intervals) in sorted(sequences.items()):
        if video not in split_of_video:
            counts["videos with labels that are in no split, left out"] += 1
            continue
        path = transcripts / f"{video}.txt"
        segments = []
        if path.is_file():
            segments = _read_transcript(path, counts)
        else:
            counts["videos without a transcript"] += 1
        audio = str(root / AUDIO / f"{video}.wav")
        utterances = _utterances(f"{labels}: {video}", video, audio, segments, features, intervals)
        counts["segments without a label, kept as context"] += sum(
            utterance.label is None for utterance in utterances
        )
        counts["labels without text, because no segment has their times"] += sum(
            not utterance.text for utterance in utterances
        )
        if utterances:
            splits[split_of_video[video]].append(Dialogue(video, utterances))
    notes = [f"{what}: {count}" for what, count in sorted(counts.items()) if count]
    for split, dialogues in splits.items():
        num_videos = sum(other == split for other in split_of_video.values())
        num_missing = num_videos - len(dialogues)
        message = f"{split}: {num_missing} of {num_videos} videos have no labels"
        if _MISSING_LIMIT * num_missing > num_videos and not partial:
            raise InputError(f"mosei: {message}; --partial allows it")
        notes += [message] if num_missing else []
    return Corpus("mosei", CLASS_NAMES, splits, scored=True, notes=tuple(notes))


def _find_folds(root: pathlib.Path) -> pathlib.Path | None:
    """Finds the SDK's file of splits, as a separate file or inside a copy of the SDK."""
    path = find(root, FOLDS) or find(root, f"{_SDK_FOLDER}/{FOLDS}")
    return path if path is not None and path.is_file() else None


def _read_transcript(path: pathlib.Path, counts: collections.Counter[str]) -> list[_Segment]:
    """Returns the segments of a transcript, sorted by start time."""
    text, is_utf8 = read_any_text(path)
    counts["transcripts that are not UTF-8, read as cp1252"] += not is_utf8
    segments: dict[int, _Segment] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        location = f"{path}: line {number}"
        match = _SEGMENT.fullmatch(line.strip())
        if match is None:
            raise InputError(
                f"{location}: {line[:60]!r}; needed: video___number___start___end___text"
            )
        try:
            start, end = float(match[3]), float(match[4])
        except ValueError as error:
            raise InputError(f"{location}: {line[:60]!r}; needed: times in seconds") from error
        segment = _Segment(int(match[2]), max(start, 0.0), end, match[5].strip())
        if segment.number in segments:
            raise InputError(f"{location}: segment {segment.number} is repeated")
        if segment.end <= segment.start:
            counts["segments of no length, left out"] += 1
            continue
        segments[segment.number] = segment
    return sorted(segments.values(), key=lambda segment: (segment.start, segment.end))


def _utterances(
    location: str,
    video: str,
    audio: str,
    segments: list[_Segment],
    features: np.ndarray,
    intervals: np.ndarray,
) -> tuple[Utterance, ...]:
    """Returns the utterances of a video, sorted by start time.

    Args:
        location: Location of the labels, named in error messages.
        video: Id of the video.
        audio: Path of the video's recording.
        segments: Segments of the video's transcript.
        features: Sentiment and emotions of each label, [n, 7].
        intervals: Start and end of each label, [n, 2].
    """
    utterances = []
    unused = list(segments)
    for number, (values, (start, end)) in enumerate(zip(features, intervals, strict=True), 1):
        score = float(values[0])
        if not MIN_SCORE <= score <= MAX_SCORE:  # Also rejects NaN.
            raise InputError(
                f"{location}: label {number}: score {score:g}; allowed: {MIN_SCORE:g} to "
                f"{MAX_SCORE:g}"
            )
        if not 0 <= max(start, 0) < end < np.inf:
            raise InputError(
                f"{location}: label {number}: interval {start:g} to {end:g}; needed: a finite end "
                "after the start and after 0"
            )
        start, end = max(float(start), 0.0), float(end)
        overlaps = [_overlap(segment, start, end) for segment in unused]
        segment = None
        if overlaps and max(overlaps) >= _MIN_OVERLAP:
            segment = unused.pop(int(np.argmax(overlaps)))
        utterances.append(
            Utterance(
                id=f"{video}_{segment.number}" if segment else f"{video}_label{number}",
                text=segment.text if segment else "",
                recording=DecodeRequest(audio, start, end),
                label=CLASS_NAMES[int(score >= 0)],
                score=score,
                start=start,
                end=end,
                metadata={
                    emotion: f"{intensity:g}"
                    for emotion, intensity in zip(EMOTIONS, values[1:], strict=True)
                },
            )
        )
    utterances += [
        Utterance(
            id=f"{video}_{segment.number}",
            text=segment.text,
            recording=DecodeRequest(audio, segment.start, segment.end),
            start=segment.start,
            end=segment.end,
        )
        for segment in unused
    ]
    return tuple(sorted(utterances, key=lambda utterance: (utterance.start, utterance.end)))


def _overlap(segment: _Segment, start: float, end: float) -> float:
    """Returns the intersection over union of the times, or a negative number if they are apart."""
    shared = min(segment.end, end) - max(segment.start, start)
    return shared / (max(segment.end, end) - min(segment.start, start))


class Mosei(DialogueBuilder):
    """TFDS builder for CMU-MOSEI."""

    read = staticmethod(read_mosei)
    BUILDER_CONFIGS: ClassVar = [
        CorpusConfig(name="binary", description="Scores in [-3, 0) and in [0, 3] as classes.")
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"""
    Get the raw data, the labels and {FOLDS} with the CMU Multimodal SDK
    (https://github.com/CMU-MultiComp-Lab/CMU-MultimodalSDK). The manual directory is
    {LAYOUT}.
    """
    DESCRIPTION = "Monologues on many topics, with a sentiment score for each segment."
    CITATION = """
    @inproceedings{zadeh2018mosei,
      title={Multimodal Language Analysis in the Wild: {CMU-MOSEI} Dataset and Interpretable Dynamic
             Fusion Graph},
      author={Zadeh, AmirAli Bagher and Liang, Paul Pu and Poria, Soujanya and Cambria, Erik and
              Morency, Louis-Philippe},
      booktitle={Proceedings of ACL},
      year={2018}
    }
    """
    LICENSE = "For research; the videos belong to their authors."
    HOMEPAGE = "http://multicomp.cs.cmu.edu/resources/cmu-mosei-dataset"
