"""Predicts the emotions of recordings and texts.

mister-jax predict --text="Hello?" --text="You again!"      # with the packaged model meld-text
mister-jax predict --model=RUN --recording=call.mp3 --output=call.html
mister-jax predict --model=RUN --recording=call.mp3 --transcript=call.srt --output=call.csv
mister-jax predict --model=RUN --recording=FOLDER --output="out/{name}.html" --output=all.jsonl
mister-jax predict --model=RUN --audio=1.wav --text="Hello?" --audio=2.wav --text="You!"
mister-jax predict --model=OWNER/NAME --text="Hello?" --text="You again!"
mister-jax predict --text_model=OWNER/NAME --speech_model=OWNER/OTHER --recording=call.mp3
mister-jax predict --model=RUN --manifest=my.jsonl --output=out.jsonl
mister-jax predict --model=RUN --corpus=meld --source=MELD.Raw --output=out.jsonl
mister-jax predict --model=RUN --follow < utterances.jsonl   # live: answers each line immediately

--model is the work directory of a training run, a folder from mister-jax export, or a name on the
Hugging Face Hub. A --recording is an entire conversation. Its utterances come from the first of
these sources that is available: --transcript, a transcript with the same name next to the
recording, speech recognition, voice activity detection. --audio and --text are the recordings and
texts of single utterances, in the order of the dialogue. An empty value means that the modality is
missing. With --follow, each line of standard input is a JSON object with the fields of a manifest,
such as {"dialogue": "7", "text": "Hello?"}. The command immediately answers each line with a JSON
line on standard output.

The extension of --output determines the format: .jsonl and .csv have one row per utterance. For
recordings, the formats .html (a page with player and waveform), .srt, .vtt, .TextGrid (Praat) and
.eaf (ELAN) are also supported. The exit status is 1 if at least one --recording is unusable, or if
the recordings of all utterances are unusable. If there is only one --recording, and this recording
cannot be read, the exit status is 2.
"""

from __future__ import annotations

import collections
import contextlib
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from mister_jax.data.transcripts.utterances import UtteranceRules
from mister_jax.errors import InputError, require_extra

if TYPE_CHECKING:
    from mister_jax.data.corpus import Corpus, Utterance
    from mister_jax.inference.recognizer import EmotionRecognizer
    from mister_jax.inference.recordings import RecordingUtterances
    from mister_jax.inference.speech_recognition import SpeechRecognizer

_MODEL = flags.DEFINE_string(
    "model",
    None,
    "work directory, exported folder, or OWNER/NAME[@REVISION] on the Hugging Face Hub; by default "
    "meld-text, which reads English text and no speech",
)
_RECORDING = flags.DEFINE_multi_string(
    "recording", [], "audio or video file of a conversation, or a folder of them; may be repeated"
)
_TRANSCRIPT = flags.DEFINE_string("transcript", None, "transcript of the --recording")
_SEARCH = flags.DEFINE_bool(
    "search_transcript", True, "use a transcript with the same name next to the recording"
)
_TIER = flags.DEFINE_string("tier", None, "tiers of the transcript to read, separated by commas")
_SPEAKER = flags.DEFINE_string("speaker", None, "read only this speaker in the transcript")
_RECOGNIZER = flags.DEFINE_string(
    "recognizer", None, "Whisper checkpoint: a size such as small, a Hub name, or a folder"
)
_LANGUAGE = flags.DEFINE_string(
    "language", None, "language of the speech, such as en; by default, Whisper detects it"
)
_NO_TEXT = flags.DEFINE_bool("no_text", False, "find utterances by voice activity, without text")
_CHANNELS = flags.DEFINE_string(
    "channels", "mix", "channels of --recording: mix, left, right, an index, or split"
)
_JOIN_GAP = flags.DEFINE_float(
    "join_gap",
    UtteranceRules.join_gap,
    "join segments of a sentence if the silence between them is shorter, in seconds; 0 joins none",
    lower_bound=0,
)
_UTTERANCE_SECONDS = flags.DEFINE_float(
    "utterance_seconds",
    UtteranceRules.utterance_seconds,
    "longest utterance in seconds that joining may create",
    lower_bound=1,
)
_EMBED_AUDIO = flags.DEFINE_bool("embed_audio", False, "store the audio in the .html file")
_MANIFEST = flags.DEFINE_string("manifest", None, ".jsonl or .csv file, see mister-jax prepare")
_CORPUS = flags.DEFINE_string("corpus", None, "iemocap, meld or mosi, with --source")
_SOURCE = flags.DEFINE_string("source", None, "folder of the corpus")
_CONFIG = flags.DEFINE_string("config", "", "config of the corpus; by default the first config")
_SPLIT = flags.DEFINE_string("split", None, "split of the corpus; by default all splits")
_AUDIO = flags.DEFINE_multi_string("audio", [], "recording of an utterance; may be repeated")
_TEXT = flags.DEFINE_multi_string("text", [], "text of an utterance; may be repeated")
_CHANNEL = flags.DEFINE_string(
    "audio_channel", "mix", "channel of --audio to read: mix, left, right, or an index from 0"
)
_FOLLOW = flags.DEFINE_bool(
    "follow", False, "read JSON lines from standard input and answer each line immediately"
)
_OUTPUT = flags.DEFINE_multi_string(
    "output", [], "file to write; {name} stands for the recording's name; may be repeated"
)
_NEW_PATH = (
    "new path of the encoder if it has moved; adapter=PATH for its adapter, whisper=PATH, "
    "beats=PATH and vicuna=PATH for SALMONN's parts; may be repeated"
)
_SPEECH_ENCODER = flags.DEFINE_multi_string("speech_encoder", [], _NEW_PATH)
_TEXT_ENCODER = flags.DEFINE_multi_string("text_encoder", [], _NEW_PATH)
_TEXT_MODEL = flags.DEFINE_string(
    "text_model", None, "published text classifier: a folder, or a name on the Hugging Face Hub"
)
_SPEECH_MODEL = flags.DEFINE_string("speech_model", None, "published audio classifier")
_TEXT_WEIGHT = flags.DEFINE_float("text_weight", 1, "weight of --text_model", lower_bound=0)
_SPEECH_WEIGHT = flags.DEFINE_float("speech_weight", 1, "weight of --speech_model", lower_bound=0)
_MAP_LABELS = flags.DEFINE_multi_string(
    "map_labels", [], "LABEL=EMOTION: emotion of a published model's label; may be repeated"
)
_SECONDS = flags.DEFINE_float(
    "max_seconds", 60, "maximum seconds of speech to read per utterance", lower_bound=0.1
)
_MIN_CONFIDENCE = flags.DEFINE_float(
    "min_confidence",
    None,
    "mark emotions whose probability is lower as uncertain",
    lower_bound=0,
    upper_bound=1,
)
_CALIBRATE = flags.DEFINE_bool(
    "calibrate", True, "calibrate the probabilities; see mister-jax evaluate"
)
_ADAPT = flags.DEFINE_bool(
    "adapt_features",
    False,
    "shift and scale standardized features to the mean and standard deviation of the training "
    "features, for recordings of another kind, such as telephone calls; the shift and scale are "
    "computed from each --recording, or from all utterances of the other inputs",
)
_WORKERS = flags.DEFINE_integer("num_workers", 0, "processes that decode audio", lower_bound=0)

_MAX_PRINTED = 40  # maximum number of utterances to print for a recording


def main() -> int:
    """Runs `mister-jax predict`."""
    _check_flags()
    if _FOLLOW.value:
        return _follow()
    if _RECORDING.value:
        return _predict_recordings()
    from mister_jax.console import output_console, prediction_table
    from mister_jax.inference.prediction_files import (
        ROW_FORMATS,
        check_predictions_path,
        write_predictions,
    )
    from mister_jax.inference.recognizer import is_unusable, summarize_notes

    corpus = _read_corpus()
    utterances = [utterance for _, utterance in corpus.utterances()]
    dialogues = [dialogue for _, dialogue in corpus.dialogues()]
    for path in _OUTPUT.value:
        check_predictions_path(path)
        if pathlib.Path(path).suffix not in ROW_FORMATS:
            raise InputError(
                f"--output={path}: needs --recording; allowed without it: {', '.join(ROW_FORMATS)}"
            )
        if _MANIFEST.value and os.path.realpath(path) == os.path.realpath(_MANIFEST.value):
            raise InputError(f"--output={path}: would replace --manifest; needed: another file")
    if len(dialogues) > 1 and not _OUTPUT.value:
        raise InputError(f"--output is needed: a file for the {len(dialogues)} dialogues")
    recognizer = _load()
    rows_by_dialogue = recognizer.predict_dialogues(
        [[_recognizer_input(it) for it in dialogue.utterances] for dialogue in dialogues],
        max_seconds=_SECONDS.value,
        min_confidence=_MIN_CONFIDENCE.value,
        num_workers=_WORKERS.value,
        quiet=False,
    )
    predictions = [row for rows in rows_by_dialogue for row in rows]
    # Files are written before anything is printed, because the reader of a pipe may have exited.
    for path in _OUTPUT.value:
        write_predictions(path, _output_rows(corpus, predictions))
    if len(dialogues) == 1:
        output_console().print(prediction_table([it.text for it in utterances], predictions))
    num_recordings = sum(it.recording is not None for it in utterances)
    notes = summarize_notes(predictions)
    if num_recordings:
        print(f"recordings: {num_recordings}" + (f", of these {notes}" if notes else ""))
    elif notes:
        print(f"utterances: {len(utterances)}, of these {notes}")
    for note in corpus.notes:
        print(f"note: {note}")
    for path in _OUTPUT.value:
        print(f"written to {path}: utterances {len(utterances)}, dialogues {len(dialogues)}")
    num_unusable = sum(any(map(is_unusable, row["notes"])) for row in predictions)
    if num_unusable and num_unusable == num_recordings:
        print(f"error: none of {num_recordings} recordings could be used", file=sys.stderr)
        return 1
    return 0


def _load() -> EmotionRecognizer:
    if _TEXT_MODEL.value or _SPEECH_MODEL.value:
        return _load_published()
    from mister_jax.inference.recognizer import load
    from mister_jax.pretrained import DEFAULT_MODEL

    if not _MODEL.value:
        print(f"model: {DEFAULT_MODEL}, which reads English text and no speech; see --model")
    return load(
        _MODEL.value or DEFAULT_MODEL,
        speech_encoder=_new_paths(_SPEECH_ENCODER.value),
        text_encoder=_new_paths(_TEXT_ENCODER.value),
        calibrate=_CALIBRATE.value,
        adapt_features=_ADAPT.value,
    )


def _load_published() -> EmotionRecognizer:
    from mister_jax.inference.recognizer import EmotionRecognizer

    map_labels = {}
    for value in _MAP_LABELS.value:
        label, separator, emotion = value.partition("=")
        if not label or not separator or not emotion:
            raise InputError(f"--map_labels={value}; needed: LABEL=EMOTION")
        map_labels[label] = emotion
    return EmotionRecognizer.from_models(
        text=_TEXT_MODEL.value,
        speech=_SPEECH_MODEL.value,
        text_weight=_TEXT_WEIGHT.value,
        speech_weight=_SPEECH_WEIGHT.value,
        map_labels=map_labels,
    )


_PUBLISHED_FLAGS = (_TEXT_WEIGHT, _SPEECH_WEIGHT, _MAP_LABELS)
_TRAINED_FLAGS = (_MODEL, _SPEECH_ENCODER, _TEXT_ENCODER, _CALIBRATE, _ADAPT)
_RECORDING_FLAGS = (
    *(_TRANSCRIPT, _SEARCH, _TIER, _SPEAKER, _RECOGNIZER, _LANGUAGE, _NO_TEXT, _CHANNELS),
    *(_JOIN_GAP, _UTTERANCE_SECONDS, _EMBED_AUDIO),
)
_UTTERANCE_FLAGS = (_CHANNEL, _SPLIT, _SOURCE, _CONFIG, _WORKERS)


def _check_flags() -> None:
    """Checks combinations of flags; input flags that exclude each other are checked later."""
    is_published = bool(_TEXT_MODEL.value or _SPEECH_MODEL.value)
    if is_published and _FOLLOW.value:
        raise InputError("--follow: cannot be used with --text_model or --speech_model")
    for flag in _TRAINED_FLAGS if is_published else _PUBLISHED_FLAGS:
        if flag.present and is_published:
            raise InputError(f"--{flag.name}: cannot be used with --text_model or --speech_model")
        if flag.present:
            raise InputError(f"--{flag.name}: needs --text_model or --speech_model")
    if _FOLLOW.value:
        sources = (_RECORDING, _MANIFEST, _CORPUS, _AUDIO, _TEXT, _OUTPUT, _ADAPT)
        for source in (*sources, *_UTTERANCE_FLAGS):
            if source.present:
                raise InputError(f"--{source.name}: cannot be used with --follow")
    if not _RECORDING.value:
        for flag in _RECORDING_FLAGS:
            if flag.present:
                raise InputError(f"--{flag.name}: needs --recording")
        for flag in (_SPLIT, _SOURCE, _CONFIG):
            if flag.present and not _CORPUS.value:
                raise InputError(f"--{flag.name}: needs --corpus")
        if _CHANNEL.present and not _AUDIO.value:
            raise InputError("--audio_channel: needs --audio")
        return
    for flag in _UTTERANCE_FLAGS:
        if flag.present:
            raise InputError(f"--{flag.name}: cannot be used with --recording")
    if _NO_TEXT.value and (_TRANSCRIPT.value or _RECOGNIZER.value or _LANGUAGE.value):
        raise InputError("--no_text: cannot be used with --transcript, --recognizer or --language")
    if _EMBED_AUDIO.value and not any(path.endswith(".html") for path in _OUTPUT.value):
        raise InputError("--embed_audio: needs an --output that ends in .html")


def _follow() -> int:
    """Answers the utterances on standard input until standard input ends."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # Only answers are written to standard output.
        from mister_jax.inference.follow import follow

        recognizer = _load()
        try:
            follow(
                recognizer,
                sys.stdin.buffer,
                answers,
                max_seconds=_SECONDS.value,
                min_confidence=_MIN_CONFIDENCE.value,
            )
        except BrokenPipeError:  # The process that reads the answers has exited.
            # At exit, Python flushes standard output, which would fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), answers.fileno())
    return 0


def _predict_recordings() -> int:
    """Predicts the conversations in --recording, one after another."""
    from mister_jax.inference.recordings import list_recordings
    from mister_jax.inference.speech_recognition import detect_voice_activity, load_recognizer

    if _MANIFEST.value or _CORPUS.value or _AUDIO.value or _TEXT.value:
        raise InputError("--recording excludes --audio, --text, --manifest and --corpus")
    recordings = list_recordings(_RECORDING.value)
    if _TRANSCRIPT.value and len(recordings) > 1:
        raise InputError(
            f"--transcript with {len(recordings)} recordings; needed: one --recording, or "
            "transcripts of the same names beside the recordings"
        )
    outputs = _outputs_by_recording(recordings)
    speech_recognizer: SpeechRecognizer | None = None
    if _NO_TEXT.value:
        speech_recognizer = detect_voice_activity
    elif _RECOGNIZER.value:
        # Load it now, so that an error stops the command before the first recording.
        speech_recognizer = load_recognizer(_RECOGNIZER.value, _LANGUAGE.value)
    recognizer = _load()
    options = {
        "transcript": _TRANSCRIPT.value,
        "search_transcript": _SEARCH.value and not _NO_TEXT.value,
        "tier": _TIER.value,
        "speaker": _SPEAKER.value,
        "recognizer": speech_recognizer,
        "language": _LANGUAGE.value,
        "channels": _CHANNELS.value,
        "rules": UtteranceRules(
            join_gap=_JOIN_GAP.value, utterance_seconds=_UTTERANCE_SECONDS.value
        ),
    }
    num_used = _predict_each(recognizer, recordings, options, outputs)
    if num_used == len(recordings):
        return 0
    num_unusable = len(recordings) - num_used
    print(
        f"error: {num_unusable} of {len(recordings)} recordings could not be used", file=sys.stderr
    )
    return 1


def _predict_each(
    recognizer: EmotionRecognizer,
    recordings: Sequence[str],
    options: Mapping[str, Any],
    outputs: Mapping[str, Sequence[str]],
) -> int:
    """Predicts recordings, and prints and writes the predictions.

    If the command is stopped, the files with all recordings' rows contain the completed recordings.

    Args:
      recognizer: Recognizer.
      recordings: Paths of the recordings.
      options: Options of `find_utterances`.
      outputs: Result of `_outputs_by_recording`.

    Returns:
      Number of recordings that could be used.
    """
    from mister_jax.console import ProgressReporter
    from mister_jax.inference.prediction_files import write_predictions
    from mister_jax.inference.recognizer import is_unusable

    is_single = len(recordings) == 1
    all_rows: list[dict[str, Any]] = []
    num_used = 0
    timeline_options: dict[str, Any] = {"embed_audio": _EMBED_AUDIO.value}
    timeline_options["channels"] = _CHANNELS.value
    with ProgressReporter(len(recordings), unit="recordings", quiet=is_single) as reporter:
        try:
            for recording in recordings:
                try:
                    utterances = recognizer.find_utterances(
                        recording, quiet=not is_single, **options
                    )
                    _check_not_overwritten(utterances, [*outputs[recording], *outputs[""]])
                    rows = recognizer.predict_utterances(
                        utterances,
                        max_seconds=_SECONDS.value,
                        min_confidence=_MIN_CONFIDENCE.value,
                        quiet=not is_single,
                    )
                    timeline_options["transcript"] = utterances.transcript
                    for path in outputs[recording]:
                        write_predictions(path, rows, **timeline_options)
                except InputError as error:
                    if is_single:
                        raise
                    print(f"error: {error}", file=sys.stderr)
                    continue
                finally:
                    reporter.advance(pathlib.Path(recording).name)
                all_rows += rows
                num_used += not all(any(map(is_unusable, row["notes"])) for row in rows)
                _print_recording(utterances, rows, outputs[recording], with_table=is_single)
        except BaseException:  # for example, Ctrl-C, or the reader of a pipe has exited
            for path in outputs[""] if all_rows else ():
                with contextlib.suppress(OSError):
                    write_predictions(path, all_rows, **timeline_options)
                    summary = f"{num_used} of {len(recordings)} recordings"
                    print(f"stopped; written to {path}: {summary}", file=sys.stderr)
            raise
    for path in outputs[""] if all_rows else ():
        # Formats that use `timeline_options` have one recording; see `_outputs_by_recording`.
        write_predictions(path, all_rows, **timeline_options)
        print(f"written to {path}: utterances {len(all_rows)}, recordings {num_used}")
    return num_used


def _print_recording(
    utterances: RecordingUtterances,
    rows: Sequence[Mapping[str, Any]],
    outputs: Sequence[str],
    *,
    with_table: bool,
) -> None:
    """Prints a summary of a recording's predictions, and the first predictions if `with_table`."""
    from mister_jax.console import output_console, prediction_table
    from mister_jax.inference.recognizer import summarize_notes

    if with_table:
        shown = rows[:_MAX_PRINTED]
        output_console().print(prediction_table([row["text"] for row in shown], shown))
        if len(rows) > len(shown):
            print(f"and {len(rows) - len(shown)} more utterances, see --output")
    notes = summarize_notes(rows)
    print(
        f"{utterances.recording}: utterances {len(rows)} from {utterances.origin}"
        + (f", of these {notes}" if notes else "")
    )
    for note in utterances.notes:
        print(f"note: {note}")
    for path in outputs:
        print(f"written to {path}")


def _check_not_overwritten(utterances: RecordingUtterances, outputs: Sequence[str]) -> None:
    """Checks that no output replaces the recording or one of its transcripts."""
    from mister_jax.data.transcripts.reader import is_transcript_of

    for path in outputs:
        if is_transcript_of(path, utterances.recording):
            raise InputError(
                f"--output={path}: would replace a transcript of {utterances.recording}; needed: "
                "another file"
            )
        for source in (utterances.recording, utterances.transcript):
            if source is not None and os.path.realpath(path) == os.path.realpath(source):
                raise InputError(f"--output={path}: would replace {source}; needed: another file")


def _outputs_by_recording(recordings: Sequence[str]) -> dict[str, list[str]]:
    """Maps each recording to its output files, and "" to the files with all recordings' rows."""
    from mister_jax.inference.prediction_files import ROW_FORMATS, check_predictions_path

    outputs: dict[str, list[str]] = {"": [], **{recording: [] for recording in recordings}}
    for pattern in _OUTPUT.value:
        if "{name}" in pattern:
            for recording in recordings:
                outputs[recording].append(pattern.replace("{name}", pathlib.Path(recording).stem))
        elif len(recordings) > 1 and pathlib.Path(pattern).suffix not in ROW_FORMATS:
            raise InputError(
                f"--output={pattern}: one file for {len(recordings)} recordings; allowed: "
                f"{', '.join(ROW_FORMATS)}, or {{name}} in the name for a file per recording"
            )
        else:
            outputs[""].append(pattern)
    paths = [path for paths in outputs.values() for path in paths]
    for path in paths:
        check_predictions_path(path)
    repeated = [path for path, count in collections.Counter(paths).items() if count > 1]
    if repeated:
        raise InputError(
            f"--output: {repeated[0]} would be written twice; needed: different names of outputs, "
            "and for {name} of recordings"
        )
    return outputs


def _new_paths(values: Sequence[str]) -> dict[str, str] | None:
    """Returns the new paths of an encoder's parts, by the part names that `load` accepts."""
    from mister_jax.extraction import ENCODER_PARTS

    paths = {}
    for value in values:
        part, _, path = value.partition("=")
        if part in ENCODER_PARTS:
            paths[part] = path
        else:
            paths["encoder"] = value
    return paths or None


def _read_corpus() -> Corpus:
    """Reads the utterances that the flags specify."""
    from mister_jax.data.corpora.manifest.reader import read_manifest

    sources = {
        "manifest": _MANIFEST.value,
        "corpus": _CORPUS.value,
        "command line": _AUDIO.value or _TEXT.value,
    }
    chosen = [name for name, value in sources.items() if value]
    if len(chosen) != 1:
        raise InputError(
            "needed: one of --recording, --manifest, --corpus with --source, or --audio and --text"
        )
    if chosen == ["manifest"]:
        # All dialogues are in one split, in the order of the file.
        return read_manifest(_MANIFEST.value or "", check_labels=False, fractions=(0, 0, 1))
    if chosen == ["corpus"]:
        return _read_released_corpus()
    return _corpus_from_flags(_AUDIO.value, _TEXT.value)


def _read_released_corpus() -> Corpus:
    # Only this source of utterances needs TensorFlow Datasets.
    require_extra("train", f"--corpus={_CORPUS.value}")
    from mister_jax.data.corpus import Corpus
    from mister_jax.data.prepare import read_released

    corpus = read_released(_CORPUS.value or "", _SOURCE.value, _CONFIG.value, partial=True)
    if _SPLIT.value is None:
        return corpus
    if not corpus.splits.get(_SPLIT.value):
        allowed = ", ".join(split for split, dialogues in corpus.splits.items() if dialogues)
        raise InputError(f"--split={_SPLIT.value}; allowed: {allowed}")
    splits = {_SPLIT.value: corpus.splits[_SPLIT.value]}
    return Corpus(corpus.name, corpus.class_names, splits, scored=corpus.scored)


def _corpus_from_flags(paths: Sequence[str], texts: Sequence[str]) -> Corpus:
    from mister_jax.data.corpora.manifest.fields import Fields
    from mister_jax.data.corpus import Corpus, DecodeRequest, Dialogue, Utterance

    if paths and texts and len(paths) != len(texts):
        raise InputError(
            f"--audio flags: {len(paths)}, --text flags: {len(texts)}; needed: as many of each, "
            "with an empty value (--audio= or --text=) for what an utterance lacks"
        )
    channel = Fields("--audio_channel", {"audio_channel": _CHANNEL.value}).channel()
    count = len(paths) or len(texts)
    utterances = []
    for index, (path, text) in enumerate(
        zip(paths or [""] * count, texts or [""] * count, strict=True), start=1
    ):
        if not path and not text.strip():
            raise InputError(f"utterance {index}: neither --audio nor --text; needed: one of them")
        recording = DecodeRequest(path, channel=channel) if path else None
        utterances.append(Utterance(str(index), text=text, recording=recording))
    return Corpus("command line", (), {"test": (Dialogue("1", tuple(utterances)),)})


def _recognizer_input(utterance: Utterance) -> dict[str, Any]:
    """Returns the fields that `predict_dialogues` reads."""
    recording = utterance.recording
    if recording is None:
        return {"text": utterance.text}
    return {
        "text": utterance.text,
        "start": utterance.start,
        "end": utterance.end,
        "audio": recording.source,
        "audio_start": recording.start,
        "audio_end": recording.end,
        "audio_channel": recording.channel,
    }


def _output_rows(corpus: Corpus, predictions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of the output: the input of each utterance and its prediction."""
    rows = []
    remaining = iter(predictions)
    for split, dialogue in corpus.dialogues():
        for utterance in dialogue.utterances:
            recording = utterance.recording
            # If the corpus states no times within the dialogue, use the times within the recording.
            start, end = utterance.start, utterance.end
            if recording is not None and start is None and end is None:
                start, end = recording.start, recording.end
            rows.append(
                {
                    **({"split": split} if _CORPUS.value else {}),
                    "dialogue": dialogue.id,
                    "utterance": utterance.id.removeprefix(f"{dialogue.id}/"),
                    "start": start,
                    "end": end,
                    "text": utterance.text,
                    "audio": None if recording is None else recording.source,
                    "label": utterance.label,
                    **({"metadata": dict(utterance.metadata)} if utterance.metadata else {}),
                    **next(remaining),
                }
            )
    return rows
