"""Reads EmoryNLP: scenes of a television series with seven emotions, text only (arXiv 1708.04299).

The release contains three JSON files. Each scene is a dialogue.
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar

from mister_jax.data.builder import CorpusConfig, DialogueBuilder
from mister_jax.data.corpora.manifest.fields import Fields
from mister_jax.data.corpora.text_files import read_any_text
from mister_jax.data.corpus import (
    Corpus,
    Dialogue,
    Utterance,
    check_sizes,
    existing_directory,
    find,
)
from mister_jax.errors import InputError

CLASS_NAMES = ("neutral", "joyful", "scared", "mad", "peaceful", "powerful", "sad")

FILES = {
    "train": "emotion-detection-trn.json",
    "validation": "emotion-detection-dev.json",
    "test": "emotion-detection-tst.json",
}

RELEASED = {"train": (713, 9934), "validation": (99, 1344), "test": (85, 1328)}
"""Number of scenes and utterances in each split."""

LAYOUT = f"a folder that contains {', '.join(FILES.values())}, or json with these files"


def read_emorynlp(source: str | pathlib.Path, *, partial: bool = False) -> Corpus:
    """Reads the scenes of EmoryNLP.

    Args:
        source: Folder that contains the JSON files, directly or one level deeper.
        partial: Whether to allow a corpus whose size differs from the release.

    Raises:
        InputError: A file is missing or an utterance cannot be used.
    """
    root = existing_directory(source, needed=LAYOUT)
    splits, notes = {}, []
    for split, name in FILES.items():
        path = find(root, name)
        if path is None:
            raise InputError(f"{root}: no {name}; needed: {LAYOUT}")
        text, is_utf8 = read_any_text(path)
        if not is_utf8:
            notes.append(f"{path}: read as cp1252, because it is not UTF-8")
        splits[split] = list(_scenes(path, text))
    corpus = Corpus("emorynlp", CLASS_NAMES, splits, notes=tuple(notes))
    return check_sizes(corpus, RELEASED, partial=partial)


def _scenes(path: pathlib.Path, text: str) -> Iterator[Dialogue]:
    """Yields the scenes in a file, except scenes without utterances."""
    try:
        contents = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", type(error).__name__)
        raise InputError(f"{path}: not JSON ({reason}); needed: episodes with scenes") from error
    for episode in _objects(contents, "episodes", str(path)):
        for scene in _objects(episode, "scenes", f"{path}: {episode.get('episode_id')}"):
            location = f"{path}: {scene.get('scene_id')}"
            utterances = tuple(
                _utterance(Fields(f"{location}: utterance {number}", values))
                for number, values in enumerate(_objects(scene, "utterances", location), 1)
            )
            if utterances:
                yield Dialogue(Fields(location, scene).id("scene_id"), utterances)


def _objects(parent: Any, field: str, location: str) -> list[dict[str, Any]]:
    """Returns a list of objects in a field of a JSON object."""
    values = parent.get(field) if isinstance(parent, dict) else None
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise InputError(
            f"{location}: {field!r} is not a list of objects; needed: EmoryNLP's format"
        )
    return values


def _utterance(fields: Fields) -> Utterance:
    label = fields.line("emotion")
    if label is None or label.lower() not in CLASS_NAMES:
        fields.fail("emotion", f"{label!r}; allowed: {', '.join(CLASS_NAMES)}")
    speakers = fields.values.get("speakers") or []
    if not isinstance(speakers, list) or not all(isinstance(name, str) for name in speakers):
        fields.fail("speakers", f"{speakers!r}; allowed: a list of names")
    return Utterance(
        id=fields.id("utterance_id"),
        text=fields.text("transcript") or "",
        label=label.lower(),
        metadata={"speaker": ", ".join(speakers)} if speakers else {},
    )


class Emorynlp(DialogueBuilder):
    """TFDS builder for EmoryNLP."""

    read = staticmethod(read_emorynlp)
    BUILDER_CONFIGS: ClassVar = [CorpusConfig(name="text", description="Text only.")]
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"""
    Get the JSON files from https://github.com/emorynlp/emotion-detection. The manual directory is
    {LAYOUT}.
    """
    DESCRIPTION = "Scenes of a television series with an emotion for each utterance, text only."
    CITATION = """
    @inproceedings{zahiri2018emotion,
      title={Emotion Detection on {TV} Show Transcripts with Sequence-Based Convolutional Neural
             Networks},
      author={Zahiri, Sayyed M. and Choi, Jinho D.},
      booktitle={AAAI Workshop on Affective Content Analysis},
      year={2018}
    }
    """
    LICENSE = "Apache 2.0 (annotation); the scenes belong to their producers."
    HOMEPAGE = "https://github.com/emorynlp/emotion-detection"
