"""Reports the contents of a prepared corpus and the issues with its recordings."""

import collections
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from mister_jax.data import audio
from mister_jax.data.audio_source import source_name
from mister_jax.data.clips import is_audible
from mister_jax.data.corpus import Corpus, Utterance
from mister_jax.data.timing import END_TOLERANCE, is_length_mismatch, is_too_fast

RECORDING_ISSUES: Mapping[str, tuple[str, ...]] = {
    "capped": ("seconds",),
    "damaged": ("seconds",),
    "silent": ("seconds",),
    "length_mismatch": ("seconds", "annotated_seconds"),
    "past_end": ("seconds", "annotated_seconds"),
    "fast_text": ("seconds", "characters"),
    "changed": ("seconds", "changed"),
}
"""Maps each issue in a report to the facts that the report states about an affected recording."""

_NUMBER = re.compile(r"-?\d+(\.\d+)?")


def recording_facts(
    utterance: Utterance, clip: audio.Clip | audio.AudioError | None
) -> dict[str, Any] | None:
    """Returns facts about an utterance's recording, or None if there is no recording."""
    if utterance.recording is None or clip is None:
        return None
    path = source_name(utterance.recording.source)
    facts: dict[str, Any] = {"utterance": utterance.id, "file": path}
    if isinstance(clip, audio.AudioError):
        reason = str(clip.reason) + (f" ({clip.detail})" if clip.detail else "")
        return {**facts, "reason": reason}
    facts |= {
        "kept_seconds": len(clip.samples) / audio.SAMPLE_RATE,
        "seconds": clip.seconds,
        "capped": clip.capped,
        "damaged": clip.damaged,
        "silent": not is_audible(clip.samples),
        "length_mismatch": False,
        "past_end": False,
        "fast_text": is_too_fast(utterance.text, clip.seconds),
        "characters": len(utterance.text),
        "changed": list(clip.notes),
    }
    if utterance.start is not None and utterance.end is not None:
        annotated = utterance.end - utterance.start
        facts["length_mismatch"] = is_length_mismatch(clip.seconds, annotated)
        facts["annotated_seconds"] = annotated
    start, end = utterance.recording.start, utterance.recording.end
    if end is not None:
        facts["annotated_seconds"] = end - (start or 0.0)
        facts["past_end"] = clip.seconds < facts["annotated_seconds"] - END_TOLERANCE
    return facts


def make_report(corpus: Corpus, facts_dir: epath.Path) -> dict[str, Any]:
    """Returns the report on a corpus as JSON values.

    `facts_dir` has one subfolder per split. The JSON files in a subfolder contain the results of
    `recording_facts`.

    Returns:
        A dict with these entries:

        - `splits`: For each split, the number of dialogues, utterances and utterances per class;
          the number of utterances that are unlabeled, lack speech, lack text, or have a text that
          also occurs in training; the hours of speech; and the minimum, mean and maximum dialogue
          length.
        - `missing`: Utterances whose recording is unusable. Each entry has the file and the reason.
        - `capped`: Recordings that are longer than `max_seconds`.
        - `damaged`: Recordings that could not be fully decoded.
        - `silent`: Recordings without audible sound.
        - `length_mismatch`: Recordings whose length differs greatly from `end` - `start`.
        - `past_end`: Utterances that end after their recording.
        - `fast_text`: Utterances whose text is too long for the length of the recording.
        - `changed`: Recordings whose samples were changed (gaps filled, scaled, channels dropped).
        - `notes`: The corpus reader's notes, and one line per kind of change with its count.
    """
    order = {utterance.id: index for index, (_, utterance) in enumerate(corpus.utterances())}
    train_texts = {turn.text for split, turn in corpus.utterances() if split == "train"}
    issues: dict[str, list[dict[str, Any]]] = {name: [] for name in ("missing", *RECORDING_ISSUES)}
    splits = {}
    for split, dialogues in corpus.splits.items():
        facts = [
            entry
            for path in (facts_dir / split).glob("*.json")
            for entry in json.loads(path.read_text())
        ]
        facts.sort(key=lambda entry: order[entry["utterance"]])
        present = [entry for entry in facts if "reason" not in entry]
        issues["missing"] += [entry for entry in facts if "reason" in entry]
        for issue, fields in RECORDING_ISSUES.items():
            issues[issue] += [
                {field: entry[field] for field in ("utterance", "file", *fields)}
                for entry in present
                if entry[issue]
            ]
        utterances = [utterance for dialogue in dialogues for utterance in dialogue.utterances]
        labels = [utterance.label for utterance in utterances]
        texts = [utterance.text for utterance in utterances if utterance.text]
        lengths = [len(dialogue.utterances) for dialogue in dialogues]
        splits[split] = {
            "dialogues": len(dialogues),
            "utterances": len(utterances),
            "classes": {name: labels.count(name) for name in corpus.class_names},
            "unlabeled": labels.count(None),
            "without_speech": len(utterances) - len(present),
            "without_text": len(utterances) - len(texts),
            "train_text_overlap": (
                0 if split == "train" else sum(text in train_texts for text in texts)
            ),
            "hours": sum(entry["kept_seconds"] for entry in present) / 3600,
            "lengths": [min(lengths), sum(lengths) / len(lengths), max(lengths)] if lengths else [],
        }
    notes = [*corpus.notes, *_count_changes(issues["changed"])]
    return {"splits": splits, **issues, "notes": notes}


def _count_changes(changed: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns one line per kind of change, with its count and the first recording as an example."""
    examples: dict[str, str] = {}
    counts: collections.Counter[str] = collections.Counter()
    for entry in changed:
        for change in entry["changed"]:
            kind = _NUMBER.sub("", change)
            counts[kind] += 1
            examples.setdefault(kind, f"{entry['utterance']}: {change}")
    return [
        f"{count} recordings changed, for example {examples[kind]}"
        for kind, count in counts.items()
    ]
