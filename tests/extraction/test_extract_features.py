"""From dialogues to features: the same in any batch, started again, of text and of speech."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from absl import logging
from mister_jax.configs import text_encoder

from mister_jax import data, extraction
from mister_jax.data.audio import SAMPLE_RATE, encode_wav
from mister_jax.data.clips import LENGTH_STEP, load_clips, pad_clips
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.prepare import DecodingOptions, PrepareOptions, prepare_corpus
from mister_jax.encoders import registry
from mister_jax.encoders import speech as speech_encoders
from mister_jax.encoders.prosody import FEATURE_NAMES, prosody
from mister_jax.encoders.tokenization import encode_texts
from mister_jax.errors import InputError
from mister_jax.extraction import encoding
from mister_jax.nn import masked_mean
from mister_jax.parallel import sharding
from mister_jax.parallel.partitioning import CompiledStep
from mister_jax.predictor import Predictor
from mister_jax.training.loop import train
from tests.helpers.tiny_encoders import WAVLM_CONFIG, save_encoder

SPEECH, TEXT = "manifest/heard", "manifest/spoken"
SECONDS = 0.8  # of Whisper


@pytest.fixture(scope="module")
def by_prosody():
    return extraction.ProsodyEncoder(max_seconds=0.5)


@pytest.fixture(scope="module")
def by_whisper(whisper_folder):
    return extraction.load_encoder(str(whisper_folder), max_seconds=SECONDS)


@pytest.fixture(scope="module")
def by_bert(bert_folder):
    return extraction.load_encoder(str(bert_folder), max_tokens=12)


@pytest.fixture(scope="module")
def by_llama(llama_folder):
    return extraction.load_encoder(str(llama_folder), max_tokens=12)


@pytest.fixture(scope="module")
def by_wavlm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_wavlm")
    save_encoder(folder, WAVLM_CONFIG)
    return extraction.load_encoder(str(folder), max_seconds=SECONDS)


@pytest.fixture(scope="module")
def by_qwen(qwen_folder):
    return extraction.load_encoder(str(qwen_folder), max_seconds=SECONDS)


@pytest.fixture(scope="module")
def by_salmonn(salmonn_options):
    return extraction.load_encoder(**salmonn_options, max_seconds=SECONDS)


@pytest.fixture(scope="module")
def speech(by_prosody, heard_dir):
    """The name of a dataset of prosody."""
    extraction.extract_features(by_prosody, SPEECH, "prosodic", heard_dir, quiet=True)
    return "prosodic"


@pytest.fixture(scope="module")
def text(by_bert, heard_dir):
    """The name of a dataset of the same utterances' text."""
    extraction.extract_features(by_bert, SPEECH, "written", heard_dir, quiet=True)
    return "written"


def some_clips():
    random = np.random.default_rng(0)
    lengths = (9000, 400, 12_800, 3000, 1700, 8000, 5000, 12_000, 640, 7777)
    return [random.normal(0, 3000, length).astype(np.int16) for length in lengths]


def some_texts():
    return ["i am so happy", "you", "we are very mad today", "so so so so so", "glad i am"] * 3


def test_prosody_is_written_where_there_is_sound(speech, heard_dir, by_prosody):
    found = data.load_features(speech, "test", heard_dir)
    clips = load_clips(SPEECH, "test", heard_dir)
    heard = np.isin(found.utterance_ids, clips.utterance_ids)
    np.testing.assert_array_equal(found.speech_present, heard)
    assert heard.sum() == 14 and not found.text_present.any()
    assert found.speech.shape == (18, len(FEATURE_NAMES)) and found.text.shape == (18, 1)
    np.testing.assert_array_equal(found.speech[~heard], 0)
    told = found.metadata["speech"]
    assert told["kind"] == "prosody" and told["dataset"] == SPEECH
    assert told.items() >= json.loads(json.dumps(by_prosody.metadata)).items()
    waveform, lengths = pad_clips(list(clips.items), 8000)
    alone, _ = prosody(waveform.astype(np.float32) / 2**15, lengths)
    np.testing.assert_allclose(found.speech[heard], alone, atol=1e-5)


def test_text_is_written_where_there_is_some(by_bert, bert_folder, spoken_dir):
    extraction.extract_features(by_bert, TEXT, "texts", spoken_dir, quiet=True)
    found = data.load_features("texts", "test", spoken_dir)
    assert found.text_present.sum() == 6 * 4 - 2 and not found.speech_present.any()
    assert found.text.shape == (24, 16) and found.speech.shape == (24, 1)
    assert found.metadata["text"]["kind"] == "text" and "speech" not in found.metadata
    module, tokenizer = registry.load_pretrained(bert_folder)
    dataset = DialogueDataset(TEXT, spoken_dir)
    turn = next(dataset.dialogues("test")).utterances[0]
    (ids,) = encode_texts(tokenizer, [turn.text], 12)
    hidden = module(ids[None], np.ones((1, len(ids)), bool))
    np.testing.assert_allclose(found.text[0], hidden[0].mean(0), atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["whisper", "prosody", "wavlm", "qwen", "salmonn", "bert", "llama"]
)
def test_features_depend_on_neither_batch_nor_padding(kind, request):
    encoder = request.getfixturevalue(f"by_{kind}")
    utterances = some_clips() if encoder.modality == "speech" else some_texts()
    together, present = extraction.encode_utterances(encoder, utterances)
    assert present.all() and len(np.unique(together[:5].round(4), axis=0)) == 5
    few, _ = extraction.encode_utterances(encoder, utterances[:3], budget=1)
    np.testing.assert_allclose(few, together[:3], atol=1e-5)
    backwards, _ = extraction.encode_utterances(encoder, utterances[::-1], budget=2)
    np.testing.assert_allclose(backwards[::-1], together, atol=1e-5)


@pytest.mark.parametrize("kind", ["whisper", "bert"])
def test_devices_do_not_change_features(kind, request, monkeypatch):
    alone = request.getfixturevalue(f"by_{kind}")
    monkeypatch.setattr(sharding, "job_devices", jax.devices)
    folder = request.getfixturevalue(f"{kind}_folder")
    spread = type(alone)(str(folder), **alone.metadata["options"])
    assert (alone.partitioner.num_shards, spread.partitioner.num_shards) == (1, 8)
    utterances = some_clips() if alone.modality == "speech" else some_texts()
    ours, theirs = (
        extraction.encode_utterances(encoder, utterances)[0] for encoder in (spread, alone)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.devices
def test_devices_do_not_change_prosody(by_prosody):
    spread = extraction.ProsodyEncoder(max_seconds=0.5)
    assert (by_prosody.partitioner.num_shards, spread.partitioner.num_shards) == (1, 8)
    ours, theirs = (
        extraction.encode_utterances(encoder, some_clips(), budget=4)[0]
        for encoder in (spread, by_prosody)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_whisper_is_the_mean_over_the_clips_positions(by_whisper, whisper_folder):
    clips = some_clips()
    found, _ = extraction.encode_utterances(by_whisper, clips)
    module = registry.load_module(whisper_folder)
    for row in (1, 2):
        waveform = clips[row][None].astype(np.float32) / 2**15
        hidden, mask = module(waveform, np.array([len(clips[row])]))
        expected = masked_mean(hidden, mask)[0]
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


def test_whisper_as_trained_hears_the_silence_behind_a_clip(whisper_folder, by_whisper):
    whole = extraction.PretrainedSpeech(str(whisper_folder), max_seconds=SECONDS, trim=False)
    assert whole.input.length_steps == () and by_whisper.input.length_steps
    clips = some_clips()[:4]
    found, _ = extraction.encode_utterances(whole, clips)
    module = registry.load_module(whisper_folder, trim=False)
    waveform, mask = pad_clips(clips, 12_800)
    hidden, mask = module(waveform.astype(np.float32) / 2**15, mask)
    np.testing.assert_allclose(found, masked_mean(hidden, mask), atol=1e-5)
    trimmed, _ = extraction.encode_utterances(by_whisper, clips)
    assert np.abs(found - trimmed).max() > 1e-2


def test_speech_beyond_a_fixed_window_is_encoded_in_windows_on_demand(whisper_folder):
    windows = extraction.PretrainedSpeech(str(whisper_folder), windows=True)
    assert windows.input.max_samples is None
    window = windows.input.max_length * LENGTH_STEP
    clip = np.tile(some_clips()[2], 40)[: 2 * window + 1000]
    found, _ = extraction.encode_utterances(windows, [clip, clip[:5000]])
    parts = np.array_split(clip, 3)  # Of equal length, so that none is a mere rest.
    each, _ = extraction.encode_utterances(windows, parts)
    weights = [len(part) for part in parts]
    np.testing.assert_allclose(found[0], np.average(each, axis=0, weights=weights), atol=1e-5)
    alone, _ = extraction.encode_utterances(windows, [clip[:5000]])
    np.testing.assert_allclose(found[1], alone[0], atol=1e-5)
    again = extraction.encoder_from_metadata(windows.metadata)
    np.testing.assert_allclose(extraction.encode_utterances(again, [clip])[0], found[:1], atol=1e-5)
    with pytest.raises(InputError, match="windows; allowed for"):
        extraction.load_encoder("prosody", windows=True)


def test_encoders_without_a_fixed_window_read_the_whole_clip(whisper_folder):
    encoder = extraction.ProsodyEncoder()
    short = some_clips()[2]
    clip = np.concatenate([np.tile(short, -(-31 * SAMPLE_RATE // len(short))), short[::-1]])
    beginning = clip[: 30 * SAMPLE_RATE]
    whole, cut = extraction.encode_utterances(encoder, [clip, beginning])[0]
    assert np.abs(whole - cut).max() > 1e-3
    limited = extraction.ProsodyEncoder(max_seconds=30.0)
    np.testing.assert_allclose(extraction.encode_utterances(limited, [clip])[0][0], cut, atol=1e-4)


def test_clips_that_lose_their_end_are_counted(whisper_folder, tmp_path, caplog):
    encode_wav(tmp_path / "long.wav", np.tile(some_clips()[2], 40)[: 4 * SAMPLE_RATE])
    row = {"dialogue": 1, "utterance": 1, "order": 1, "audio": "long.wav", "label": "calm"}
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps(row | {"split": "train"}) + "\n")
    prepare_corpus(PrepareOptions("manifest", manifest, tmp_path, decoding=DecodingOptions(0)))
    encoder = extraction.PretrainedSpeech(str(whisper_folder), max_seconds=SECONDS)
    with caplog.at_level(logging.WARNING):
        extraction.extract_features(encoder, "manifest/m", "cut", tmp_path, quiet=True)
    assert f"1 utterances are longer than {SECONDS:g} s and are truncated" in caplog.text


@pytest.mark.parametrize("kind", ["whisper", "prosody"])
def test_odd_clips_are_absent_or_finite(kind, request):
    encoder = request.getfixturevalue(f"by_{kind}")
    loud = np.where(np.arange(5000) % 100 < 50, 2**15 - 1, -(2**15)).astype(np.int16)
    ten_minutes = np.tile(some_clips()[2], 750)
    odd = [np.zeros(0), np.ones(1), np.zeros(9000), loud, ten_minutes]
    odd = [clip.astype(np.int16) for clip in odd]
    found, present = extraction.encode_utterances(encoder, odd)
    np.testing.assert_array_equal(present, [False, False, False, True, True])
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[:3], 0)
    longest = encoder.input.max_length * LENGTH_STEP
    cut, _ = extraction.encode_utterances(encoder, [ten_minutes[:longest]])
    np.testing.assert_allclose(found[4], cut[0], atol=1e-5)


def test_silence_until_the_cut_is_absent_in_memory_and_in_a_dataset(
    by_prosody, heard_dir, monkeypatch
):
    late = np.append(np.zeros(9000), some_clips()[0]).astype(np.int16)
    turn = types.SimpleNamespace(id="late", audio=late, speech_present=True, label=0, score=None)
    dialogues = [types.SimpleNamespace(id="one", utterances=[turn])]
    monkeypatch.setattr(DialogueDataset, "dialogues", lambda *_: iter(dialogues))
    assert not by_prosody.input.load(SPEECH, "train", heard_dir).items
    assert not len(by_prosody.input.items([late])[0])


def test_what_is_cut_is_told_of_the_split(bert_folder, spoken_dir, monkeypatch):
    told = []
    monkeypatch.setattr(logging, "warning", lambda line, *values: told.append(line % values))
    extraction.PretrainedText(str(bert_folder), max_tokens=4).input.load(TEXT, "test", spoken_dir)
    assert told[0].startswith(f"dataset {TEXT}, split test: ")
    assert told[0].endswith("22 texts truncated to 4 tokens")


def test_texts_of_nothing_are_absent(by_bert):
    found, present = extraction.encode_utterances(by_bert, ["", "i am", " \n"])
    np.testing.assert_array_equal(present, [False, True, False])
    assert not found[[0, 2]].any() and found[1].any()


def test_nothing_to_read_at_all_is_said(by_bert, by_prosody):
    for encoder, nothing in ((by_bert, [""]), (by_prosody, [np.zeros(9, np.int16)])):
        with pytest.raises(InputError, match=f"1 utterances: none has {encoder.modality}"):
            extraction.encode_utterances(encoder, nothing)
    with pytest.raises(ValueError, match="needed: \\[s\\] int16"):
        extraction.encode_utterances(by_prosody, [np.zeros(9000)])


def test_an_encoder_is_found_again_by_its_identity(by_whisper, by_prosody, by_bert):
    for encoder in (by_whisper, by_prosody, by_bert):
        told = json.loads(json.dumps({"dataset": "any", "budget": 1, **encoder.metadata}))
        again = extraction.encoder_from_metadata(told)
        assert type(again) is type(encoder) and again.modality == encoder.modality
        utterances = some_texts()[:2] if encoder is by_bert else some_clips()[:2]
        found, expected = (
            extraction.encode_utterances(one, utterances)[0] for one in (again, encoder)
        )
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_an_identity_that_leads_nowhere_is_refused(by_whisper, by_prosody, tmp_path):
    with pytest.raises(InputError, match="kind None, whose encoder is unknown"):
        extraction.encoder_from_metadata({"sha256": "features from elsewhere"})
    with pytest.raises(InputError, match=r"the encoder has changed .* \(features\)"):
        extraction.encoder_from_metadata(by_prosody.metadata | {"features": ["others"]})
    with pytest.raises(InputError, match="no such folder"):
        extraction.encoder_from_metadata(by_whisper.metadata | {"name": str(tmp_path / "gone")})


def test_a_tuned_encoder_gives_what_its_head_gives(bert_folder, spoken_dir, tmp_path):
    config = text_encoder.get_config("manifest/spoken,minilm_l6")
    config.data.update({"data_dir": str(spoken_dir), "num_buckets": 1})
    config.encoder.options.update({"name": str(bert_folder), "max_tokens": 12})
    config.head.feature_dim = 10
    config.train.epochs = 1
    train(config, tmp_path / "run", quiet=True)
    encoder = extraction.TunedEncoder(tmp_path / "run")
    extraction.extract_features(encoder, TEXT, "tuned", spoken_dir, quiet=True)
    found = data.load_features("tuned", "validation", spoken_dir)
    predictor = Predictor(tmp_path / "run")
    expected = predictor(predictor.task.features("validation"), quiet=True)["feature"]
    np.testing.assert_allclose(found.text[found.text_present], expected, atol=1e-5)
    told = found.metadata["text"]
    assert told["kind"] == "tuned" and told["best"]["epoch"] == 1
    again = extraction.encoder_from_metadata(told)
    features, _ = extraction.encode_utterances(again, some_texts()[:2])
    np.testing.assert_allclose(
        features, extraction.encode_utterances(encoder, some_texts()[:2])[0], atol=1e-6
    )
    with pytest.raises(InputError, match=r"the encoder has changed .* \(best\)"):
        extraction.encoder_from_metadata(told | {"best": {"epoch": 2}})


class Counting:
    """An encoder that counts what it reads, and stops after a number of batches."""

    def __init__(self, encoder, batches=None):
        self.encoder, self.left, self.read = encoder, batches, 0

    def __getattr__(self, name):
        return getattr(self.encoder, name)

    def __call__(self, batch):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left = None if self.left is None else self.left - 1
        self.read += int((np.asarray(batch["row"]) >= 0).sum())
        return self.encoder(batch)


def test_stopped_and_started_again_it_does_the_rest(by_prosody, speech, heard_dir, monkeypatch):
    monkeypatch.setattr(encoding, "_ITEMS_PER_FILE", 16)
    stopped = Counting(by_prosody, batches=3)
    with pytest.raises(KeyboardInterrupt):
        extraction.extract_features(stopped, SPEECH, "stopped", heard_dir, quiet=True)
    left = list(heard_dir.glob(".extracting.stopped.*/*.npy"))
    assert left and not (heard_dir / "stopped").exists()
    kept = sum(len(np.load(path)) for path in left)
    rest = Counting(by_prosody)
    extraction.extract_features(rest, SPEECH, "stopped", heard_dir)
    total = sum(len(load_clips(SPEECH, split, heard_dir).items) for split in data.SPLITS)
    assert 0 < rest.read == total - kept
    assert not list(heard_dir.glob(".extracting*"))
    for split in data.SPLITS:
        found, expected = (
            data.load_features(name, split, heard_dir) for name in ("stopped", speech)
        )
        np.testing.assert_allclose(found.speech, expected.speech, atol=1e-5)


def test_what_another_encoder_left_is_not_taken(by_prosody, heard_dir, monkeypatch):
    monkeypatch.setattr(encoding, "_ITEMS_PER_FILE", 16)
    with pytest.raises(KeyboardInterrupt):
        extraction.extract_features(
            Counting(by_prosody, batches=3), SPEECH, "other", heard_dir, quiet=True
        )
    other = Counting(extraction.ProsodyEncoder(max_seconds=0.4))
    extraction.extract_features(other, SPEECH, "other", heard_dir, quiet=True)
    assert other.read == sum(
        len(load_clips(SPEECH, split, heard_dir).items) for split in data.SPLITS
    )


def test_both_modalities_are_joined_by_utterance(speech, text, heard_dir):
    extraction.merge_features(speech, text, "both", heard_dir)
    for split in data.SPLITS:
        heard, read, both = (
            data.load_features(name, split, heard_dir) for name in (speech, text, "both")
        )
        np.testing.assert_array_equal(both.speech, heard.speech)
        np.testing.assert_array_equal(both.text, read.text)
        np.testing.assert_array_equal(both.speech_present, heard.speech_present)
        assert both.text_present.all()
        np.testing.assert_array_equal(both.label, read.label)
        assert both.metadata["speech"] == heard.metadata["speech"]
        assert both.metadata["text"] == read.metadata["text"]
    # A merged dataset may give either, and tells of no encoder whose features it lacks.
    with pytest.raises(InputError, match="exists"):
        extraction.merge_features("both", text, "both", heard_dir)
    extraction.merge_features(speech, "both", "both", heard_dir, overwrite=True)
    assert data.load_features("both", "test", heard_dir).metadata["speech"]["kind"] == "prosody"


def test_what_does_not_fit_together_is_not_merged(speech, text, heard_dir, tmp_path):
    with pytest.raises(InputError, match=f"dataset {text}: no utterance has speech"):
        extraction.merge_features(text, speech, "swapped", heard_dir)
    test = data.load_features(text, "test", heard_dir)
    splits = {split: data.load_features(text, split, heard_dir) for split in data.SPLITS}

    def refused(message, **changes):
        changed = {**splits, "test": dataclasses.replace(test, **changes)}
        data.write_features(changed, "changed", heard_dir, overwrite=True)
        with pytest.raises(InputError, match=message):
            extraction.merge_features(speech, "changed", "never", heard_dir)
        assert not (heard_dir / "never").exists()

    refused("1 labels differ, the first is that of utterance", label=swapped(test.label, 0))
    ids = test.utterance_ids.copy()
    ids[0] = "nobody"
    refused("2 utterances are in one of them alone", utterance_ids=ids)
    data.write_features({"train": splits["train"]}, "changed", heard_dir, overwrite=True)
    with pytest.raises(InputError, match="has splits"):
        extraction.merge_features(speech, "changed", "never", heard_dir)


def swapped(label, row):
    label = label.copy()
    label[row] = 1 - label[row]
    return label


@pytest.mark.parametrize(
    ("dataset", "output", "message"),
    [
        ("manifest/unheard", "new", "no dataset 'manifest/unheard'"),
        (SPEECH, "prosodic", "dataset exists; allowed: another --output, or --overwrite"),
        (SPEECH, "a/b", "--output=a/b; allowed: lower-case letters"),
        ("prosodic", "new", "contains no recordings"),
        ("manifest/silent", "new", "split train: no utterance has speech"),
    ],
)
def test_what_cannot_be_extracted_is_said(
    by_prosody, speech, silent, heard_dir, dataset, output, message
):
    with pytest.raises(InputError, match=message) as error:
        extraction.extract_features(by_prosody, dataset, output, heard_dir, quiet=True)
    assert "\n" not in str(error.value)
    assert not (heard_dir / "new").exists()


@pytest.fixture(scope="module")
def silent(heard_dir, tmp_path_factory):
    """The dataset `manifest/silent`, of texts alone."""
    from mister_jax.data.prepare import DecodingOptions, PrepareOptions, prepare_corpus

    rows = [
        {
            "dialogue": split,
            "utterance": 0,
            "order": 0,
            "split": split,
            "text": "so",
            "label": label,
        }
        for split, label in zip(data.SPLITS, ("joy", "anger", "joy"), strict=True)
    ]
    manifest = tmp_path_factory.mktemp("silent") / "silent.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_corpus(PrepareOptions("manifest", manifest, heard_dir, decoding=DecodingOptions(0)))


def test_encoders_that_cannot_be_opened_are_said(whisper_folder, bert_folder, tmp_path):
    with pytest.raises(InputError, match=r"max_seconds=1; allowed: 0\.1 to 0\.8, as"):
        extraction.load_encoder(str(whisper_folder), max_seconds=1.0)
    for seconds in (0.01, float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"max_seconds={seconds:g}; allowed: 0.1 to 3600"):
            extraction.load_encoder("prosody", max_seconds=seconds)
        with pytest.raises(InputError, match=f"max_seconds={seconds:g}; allowed: 0.1 to"):
            extraction.PretrainedSpeech(str(whisper_folder), max_seconds=seconds)
    with pytest.raises(InputError, match=r"prompt 'well'; allowed: none"):
        extraction.load_encoder(str(whisper_folder), max_seconds=SECONDS, prompt="well")
    with pytest.raises(InputError, match="encodes text; allowed for speech: "):
        extraction.PretrainedSpeech(str(bert_folder))
    with pytest.raises(InputError, match=r"config\.json"):
        extraction.TunedEncoder(tmp_path)


def test_a_lack_of_memory_names_what_takes_less(
    by_prosody, by_bert, bert_folder, whisper_folder, monkeypatch, out_of_memory
):
    def refused(call, *parts):
        with pytest.raises(InputError, match="out of memory with ") as error:
            call()
        message = str(error.value)
        assert "\n" not in message
        assert all(part in message for part in ("allocating 7 bytes", *parts))
        return message

    monkeypatch.setattr(CompiledStep, "__call__", out_of_memory)
    monkeypatch.setattr(by_prosody, "_read", out_of_memory)
    told = refused(
        lambda: extraction.encode_utterances(by_bert, some_texts(), budget=16),
        "extraction: ", "batches of ", " tokens on 8 devices", "smaller --budget or --dtype=bfl",
    )  # fmt: skip
    told = refused(
        lambda: extraction.encode_utterances(by_prosody, some_clips()), "try a smaller --budget"
    )
    assert "dtype" not in told  # which it does not have
    light = extraction.PretrainedText(str(bert_folder), max_tokens=12, dtype="bfloat16")
    assert "dtype" not in refused(lambda: extraction.encode_utterances(light, some_texts()))
    monkeypatch.setattr(registry, "load_backbone", out_of_memory)
    for folder, options in (
        (bert_folder, {"max_tokens": 12}),
        (whisper_folder, {"max_seconds": SECONDS}),
    ):
        refused(
            lambda folder=folder, options=options: extraction.load_encoder(str(folder), **options),
            f"{folder}: ", "the encoder's parameters", "--dtype=bfloat16",
        )  # fmt: skip


def test_options_that_an_encoder_does_not_have_are_refused(whisper_folder, bert_folder):
    def refused(message, name, **options):
        with pytest.raises(InputError, match=message) as error:
            extraction.load_encoder(str(name), **options)
        assert "\n" not in str(error.value)

    message = r"max_seconds, trim; allowed for an encoder of this kind \(text\): max_tokens, "
    refused(f"{bert_folder}: {message}", bert_folder, max_seconds=1.0, trim=False)
    refused("max_tokens; allowed for .*speech.*: max_seconds, ", whisper_folder, max_tokens=9)
    refused("prosody: dtype; allowed for .*: max_seconds$", "prosody", dtype="bfloat16")
    refused("allowed: all of them", whisper_folder, max_seconds=SECONDS, beats="beats")


def test_salmonn_is_read_as_it_was_released(salmonn_options, tmp_path, monkeypatch):
    options = {name: value for name, value in salmonn_options.items() if name != "name"}
    encoder = extraction.load_encoder(salmonn_options["name"], max_seconds=1.0, **options)
    found, present = extraction.encode_utterances(encoder, some_clips()[:3])
    assert present.all() and np.isfinite(found).all()
    monkeypatch.chdir(tmp_path)
    # Its parts lie elsewhere when it is needed again.
    places = {part: tmp_path / part for part in ("encoder", *options)}
    for part, place in places.items():
        place.symlink_to(salmonn_options["name" if part == "encoder" else part])
    gone = json.loads(json.dumps(encoder.metadata).replace(salmonn_options["name"], "/gone"))
    gone["options"].update(dict.fromkeys(options, "/gone"))
    again = extraction.encoder_from_metadata(
        extraction.with_new_paths(gone, {p: str(place) for p, place in places.items()})
    )
    np.testing.assert_allclose(
        extraction.encode_utterances(again, some_clips()[:3])[0], found, atol=1e-5
    )
    files = speech_encoders.SpeechFiles(**salmonn_options)
    described = speech_encoders.read_backbone_config(files)
    paths = speech_encoders.trainable_paths(described)
    assert (paths["lora"].rank, paths["lora"].alpha) == (2, 32.0)
    module = speech_encoders.load_speech_encoder(files, described, **paths)
    waveform, lengths = pad_clips(some_clips()[:3], 16_000)
    expected = masked_mean(*module(waveform.astype(np.float32) / 2**15, lengths))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    with pytest.raises(InputError, match="trim=False; allowed: True, it is not Whisper"):
        extraction.load_encoder(salmonn_options["name"], max_seconds=1.0, trim=False, **options)
