"""Feature datasets: extraction, resumption, merging and errors."""

import dataclasses
import json

import numpy as np
import pytest
from absl import logging

from mister_jax import data, extraction
from mister_jax.configs import text_encoder
from mister_jax.data.audio import SAMPLE_RATE, encode_wav
from mister_jax.data.clips import load_clips
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.padding import pad_clips
from mister_jax.data.prepare import DecodingOptions, PrepareOptions, prepare_corpus
from mister_jax.encoders import registry
from mister_jax.encoders.prosody import FEATURE_NAMES, compute_prosody
from mister_jax.encoders.tokenization import encode_texts
from mister_jax.errors import InputError
from mister_jax.extraction import encoder as encoder_module
from mister_jax.predictor import Predictor
from mister_jax.training.loop import train
from tests.helpers.utterances import SECONDS, SPEECH, TEXT, make_clips, make_texts


def test_prosody_is_written_where_speech_is_audible(speech_dataset, heard_dir, prosody_encoder):
    features = data.load_features(speech_dataset, "test", heard_dir)
    clips = load_clips(SPEECH, "test", heard_dir)
    is_audible = np.isin(features.utterance_ids, clips.utterance_ids)
    np.testing.assert_array_equal(features.speech_present, is_audible)
    assert is_audible.sum() == 14 and not features.text_present.any()
    assert features.speech.shape == (18, len(FEATURE_NAMES)) and features.text.shape == (18, 1)
    np.testing.assert_array_equal(features.speech[~is_audible], 0)
    metadata = features.metadata["speech"]
    assert metadata["kind"] == "prosody" and metadata["dataset"] == SPEECH
    assert metadata.items() >= json.loads(json.dumps(prosody_encoder.metadata)).items()
    waveform, lengths = pad_clips(list(clips.items), 8000)
    expected, _ = compute_prosody(waveform.astype(np.float32) / 2**15, lengths)
    np.testing.assert_allclose(features.speech[is_audible], expected, atol=1e-5)


def test_text_features_are_written_where_text_is_present(bert_encoder, bert_folder, spoken_dir):
    extraction.extract_features(bert_encoder, TEXT, "texts", spoken_dir, quiet=True)
    features = data.load_features("texts", "test", spoken_dir)
    assert features.text_present.sum() == 6 * 4 - 2 and not features.speech_present.any()
    assert features.text.shape == (24, 16) and features.speech.shape == (24, 1)
    assert features.metadata["text"]["kind"] == "text" and "speech" not in features.metadata
    module, tokenizer = registry.load_pretrained(bert_folder)
    dataset = DialogueDataset(TEXT, spoken_dir)
    turn = next(dataset.dialogues("test")).utterances[0]
    (ids,) = encode_texts(tokenizer, [turn.text], 12)
    hidden_states = module(ids[None], np.ones((1, len(ids)), bool))
    np.testing.assert_allclose(features.text[0], hidden_states[0].mean(0), atol=1e-5)


def test_truncated_clips_are_logged(whisper_folder, tmp_path, caplog):
    encode_wav(tmp_path / "long.wav", np.tile(make_clips()[2], 40)[: 4 * SAMPLE_RATE])
    row = {"dialogue": 1, "utterance": 1, "order": 1, "audio": "long.wav", "label": "calm"}
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps(row | {"split": "train"}) + "\n")
    prepare_corpus(PrepareOptions("manifest", manifest, tmp_path, decoding=DecodingOptions(0)))
    encoder = extraction.PretrainedSpeech(str(whisper_folder), max_seconds=SECONDS)
    with caplog.at_level(logging.WARNING):
        extraction.extract_features(encoder, "manifest/m", "truncated", tmp_path, quiet=True)
    assert f"1 utterances are longer than {SECONDS:g} s and are truncated" in caplog.text


def test_tuned_encoder_extracts_features_of_its_head(bert_folder, spoken_dir, tmp_path):
    config = text_encoder.get_config("manifest/spoken,minilm_l6")
    config.data.update({"data_dir": str(spoken_dir), "num_buckets": 1})
    config.encoder.options.update({"name": str(bert_folder), "max_tokens": 12})
    config.head.feature_dim = 10
    config.train.epochs = 1
    train(config, tmp_path / "run", quiet=True)
    encoder = extraction.TunedEncoder(tmp_path / "run")
    extraction.extract_features(encoder, TEXT, "tuned", spoken_dir, quiet=True)
    dataset = data.load_features("tuned", "validation", spoken_dir)
    predictor = Predictor(tmp_path / "run")
    expected = predictor(predictor.task.features("validation"), quiet=True)["feature"]
    np.testing.assert_allclose(dataset.text[dataset.text_present], expected, atol=1e-5)
    metadata = dataset.metadata["text"]
    assert metadata["kind"] == "tuned" and metadata["best"]["epoch"] == 1
    restored = extraction.encoder_from_metadata(metadata)
    features, _ = extraction.encode_utterances(restored, make_texts()[:2])
    np.testing.assert_allclose(
        features, extraction.encode_utterances(encoder, make_texts()[:2])[0], atol=1e-6
    )
    with pytest.raises(InputError, match=r"the encoder has changed .* \(best\)"):
        extraction.encoder_from_metadata(metadata | {"best": {"epoch": 2}})


class CountingEncoder:
    """An encoder that counts the utterances it encodes, and stops after a number of batches."""

    def __init__(self, encoder, batches=None):
        self.encoder, self.num_left, self.num_encoded, self.shapes = encoder, batches, 0, []

    def __getattr__(self, name):
        return getattr(self.encoder, name)

    def __call__(self, batch):
        if self.num_left == 0:
            raise KeyboardInterrupt
        self.num_left = None if self.num_left is None else self.num_left - 1
        self.num_encoded += int((np.asarray(batch["row"]) >= 0).sum())
        self.shapes.append(batch["waveform"].shape)
        return self.encoder(batch)


def test_the_splits_of_a_small_corpus_share_a_program(prosody_encoder, speech_dataset, heard_dir):
    counting = CountingEncoder(prosody_encoder)
    extraction.extract_features(counting, SPEECH, "counted", heard_dir, quiet=True)
    sizes = [len(load_clips(SPEECH, split, heard_dir).items) for split in data.SPLITS]
    assert len(set(sizes)) > 1 and len(counting.shapes) >= len(data.SPLITS)
    assert len(set(counting.shapes)) == 1


def test_interrupted_extraction_resumes(prosody_encoder, speech_dataset, heard_dir, monkeypatch):
    monkeypatch.setattr(encoder_module, "_ITEMS_PER_FILE", 16)
    stopped = CountingEncoder(prosody_encoder, batches=3)
    with pytest.raises(KeyboardInterrupt):
        extraction.extract_features(stopped, SPEECH, "stopped", heard_dir, quiet=True)
    saved = list(heard_dir.glob(".extracting.stopped.*/*.npy"))
    assert saved and not (heard_dir / "stopped").exists()
    num_saved = sum(len(np.load(path)) for path in saved)
    resumed = CountingEncoder(prosody_encoder)
    extraction.extract_features(resumed, SPEECH, "stopped", heard_dir)
    total = sum(len(load_clips(SPEECH, split, heard_dir).items) for split in data.SPLITS)
    assert 0 < resumed.num_encoded == total - num_saved
    assert not list(heard_dir.glob(".extracting*"))
    for split in data.SPLITS:
        features, expected = (
            data.load_features(name, split, heard_dir) for name in ("stopped", speech_dataset)
        )
        np.testing.assert_allclose(features.speech, expected.speech, atol=1e-5)


def test_partial_features_of_other_encoder_are_not_reused(prosody_encoder, heard_dir, monkeypatch):
    monkeypatch.setattr(encoder_module, "_ITEMS_PER_FILE", 16)
    with pytest.raises(KeyboardInterrupt):
        extraction.extract_features(
            CountingEncoder(prosody_encoder, batches=3), SPEECH, "other", heard_dir, quiet=True
        )
    other = CountingEncoder(extraction.ProsodyEncoder(max_seconds=0.4))
    extraction.extract_features(other, SPEECH, "other", heard_dir, quiet=True)
    assert other.num_encoded == sum(
        len(load_clips(SPEECH, split, heard_dir).items) for split in data.SPLITS
    )


def test_merge_joins_modalities_by_utterance(speech_dataset, text_dataset, heard_dir):
    extraction.merge_features(speech_dataset, text_dataset, "both", heard_dir)
    for split in data.SPLITS:
        speech, text, both = (
            data.load_features(name, split, heard_dir)
            for name in (speech_dataset, text_dataset, "both")
        )
        np.testing.assert_array_equal(both.speech, speech.speech)
        np.testing.assert_array_equal(both.text, text.text)
        np.testing.assert_array_equal(both.speech_present, speech.speech_present)
        assert both.text_present.all()
        np.testing.assert_array_equal(both.label, text.label)
        assert both.metadata["speech"] == speech.metadata["speech"]
        assert both.metadata["text"] == text.metadata["text"]
    # An input may be a merged dataset. Only the metadata of its used features is kept.
    with pytest.raises(InputError, match="exists"):
        extraction.merge_features("both", text_dataset, "both", heard_dir)
    extraction.merge_features(speech_dataset, "both", "both", heard_dir, overwrite=True)
    assert data.load_features("both", "test", heard_dir).metadata["speech"]["kind"] == "prosody"


def test_features_are_exported_with_the_times_of_the_utterances(
    speech_dataset, heard_dir, tmp_path
):
    path = tmp_path / "speech.npz"
    extraction.export_features(speech_dataset, [path], heard_dir, times_of=SPEECH)
    features = data.load_features(speech_dataset, "test", heard_dir)
    read = data.read_npz(path)["test"]
    np.testing.assert_array_equal(read.speech, features.speech)
    np.testing.assert_array_equal(read.label, features.label)
    assert read.utterance_ids.tolist() == features.utterance_ids.tolist()
    turns = [
        turn
        for dialogue in DialogueDataset(SPEECH, heard_dir).dialogues("train")
        for turn in dialogue.utterances
    ]
    with np.load(path) as archive:
        columns = {name: archive[name] for name in ("start", "end") if name in archive.files}
    times = np.array([(turn.start, turn.end) for turn in turns])
    assert bool(columns) == np.isfinite(times).any()
    for name, expected in zip(columns, times.T, strict=False):
        np.testing.assert_array_equal(columns[name][: len(turns)], expected)


def test_mismatched_datasets_are_not_merged(speech_dataset, text_dataset, heard_dir, tmp_path):
    with pytest.raises(InputError, match=f"dataset {text_dataset}: no utterance has speech"):
        extraction.merge_features(text_dataset, speech_dataset, "swapped", heard_dir)
    test = data.load_features(text_dataset, "test", heard_dir)
    splits = {split: data.load_features(text_dataset, split, heard_dir) for split in data.SPLITS}

    def assert_refused(message, **changes):
        changed = {**splits, "test": dataclasses.replace(test, **changes)}
        data.write_features(changed, "changed", heard_dir, overwrite=True)
        with pytest.raises(InputError, match=message):
            extraction.merge_features(speech_dataset, "changed", "never", heard_dir)
        assert not (heard_dir / "never").exists()

    assert_refused(
        "1 labels differ, for example the label of utterance", label=flip_label(test.label, 0)
    )
    ids = test.utterance_ids.copy()
    ids[0] = "nobody"
    assert_refused("2 utterances are in only one of the datasets", utterance_ids=ids)
    data.write_features({"train": splits["train"]}, "changed", heard_dir, overwrite=True)
    with pytest.raises(InputError, match="has splits"):
        extraction.merge_features(speech_dataset, "changed", "never", heard_dir)


def flip_label(label, row):
    label = label.copy()
    label[row] = 1 - label[row]
    return label


@pytest.mark.parametrize(
    ("dataset", "output", "message"),
    [
        ("manifest/unheard", "new", "no dataset 'manifest/unheard'"),
        (SPEECH, "prosodic", "dataset exists; allowed: another --output, or --overwrite"),
        (SPEECH, "a/b", "--output=a/b; allowed: lower-case letters"),
        ("prosodic", "new", "a dataset of features; needed: a dataset of dia"),
        ("manifest/texts", "new", "train: no utterance has speech, because the split has no usab"),
        ("manifest/silent", "new", "train: no utterance has speech, because all recordings are si"),
    ],
)
def test_invalid_extraction_is_refused(
    prosody_encoder, speech_dataset, datasets_without_speech, heard_dir, dataset, output, message
):
    with pytest.raises(InputError, match=message) as error:
        extraction.extract_features(prosody_encoder, dataset, output, heard_dir, quiet=True)
    assert "\n" not in str(error.value)
    assert not (heard_dir / "new").exists()


@pytest.fixture(scope="module")
def datasets_without_speech(heard_dir, tmp_path_factory):
    """Writes `manifest/texts`, which has only texts, and `manifest/silent` with silence."""
    folder = tmp_path_factory.mktemp("without_speech")
    row = {"utterance": 0, "order": 0, "label": "joy"}
    for split in data.SPLITS:
        encode_wav(folder / f"{split}.wav", np.zeros(8000, np.int16))
    for name, field, suffix in (("texts", "text", ""), ("silent", "audio", ".wav")):
        rows = [
            {**row, "dialogue": split, "split": split, field: split + suffix}
            for split in data.SPLITS
        ]
        manifest = folder / f"{name}.jsonl"
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        prepare_corpus(PrepareOptions("manifest", manifest, heard_dir, decoding=DecodingOptions(0)))
