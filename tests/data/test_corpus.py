"""Mistakes in the builder or the reader of a corpus are found before recordings are decoded."""

import dataclasses
import pathlib
from typing import ClassVar

import pytest

from mister_jax.data.builder import CorpusConfig, DialogueBuilder
from mister_jax.data.corpora import registry
from mister_jax.data.corpus import Corpus, DecodeRequest, Dialogue, Utterance
from mister_jax.data.prepare import DecodingOptions, PrepareOptions, prepare_corpus
from mister_jax.errors import InputError


def read_radio_play(source, *, station="a", partial=False):
    utterance = Utterance("u1", text=station, recording=DecodeRequest(f"{source}/1.wav"), label="x")
    return Corpus("radio_play", ("x",), {"train": [Dialogue("d1", (utterance,))]})


class RadioPlay(DialogueBuilder, skip_registration=True):
    read = staticmethod(read_radio_play)
    BUILDER_CONFIGS: ClassVar = [
        CorpusConfig(name="all"),
        CorpusConfig(name="station_b", options={"station": "b"}),
        CorpusConfig(name="year", options={"year": 1938}),
    ]
    DESCRIPTION = "Radio plays."
    LICENSE = "None."


@pytest.fixture
def radio_play(monkeypatch):
    monkeypatch.setitem(registry.CORPORA, "radio_play", f"{__name__}.RadioPlay")


def test_a_new_corpus_is_prepared(radio_play, tmp_path, write_wav):
    write_wav(tmp_path / "1.wav")
    options = PrepareOptions("radio_play", tmp_path, tmp_path / "data", "station_b")
    report = prepare_corpus(dataclasses.replace(options, decoding=DecodingOptions(0)))
    assert report["dataset"] == "radio_play/station_b"
    assert pathlib.Path(report["directory"], "dataset_info.json").exists()


@pytest.mark.parametrize(
    ("key", "class_name", "message"),
    [
        ("play", "RadioPlay", "'radio_play'; needed: the class name Play, or the key 'radio_play'"),
        ("radio_2", "RadioPlay", "'radio_play'; needed: the class name Radio_2, or the key 'rad"),
        ("radio_play", "RadioDrama", "RadioDrama: no such subclass of DialogueBuilder"),
        ("radio_play", "read_radio_play", "read_radio_play: no such subclass of DialogueBuilder"),
    ],
)
def test_the_class_of_a_corpus_matches_its_key(monkeypatch, tmp_path, key, class_name, message):
    monkeypatch.setitem(registry.CORPORA, key, f"{__name__}.{class_name}")
    with pytest.raises(InputError, match=f"corpus '{key}': {__name__}.{class_name}: .*") as error:
        prepare_corpus(PrepareOptions(key, tmp_path, tmp_path / "data"))
    assert message in str(error.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("attribute", ["read", "BUILDER_CONFIGS", "DESCRIPTION", "LICENSE"])
def test_the_class_of_a_corpus_has_all_attributes(radio_play, monkeypatch, attribute):
    monkeypatch.delattr(RadioPlay, attribute)
    with pytest.raises(InputError, match=f"RadioPlay: no {attribute}; needed: read, BUILDER_CON"):
        registry.builder_class("radio_play")


def test_every_registered_builder_passes_the_checks():
    assert [registry.builder_class(name).name for name in registry.CORPORA] == [*registry.CORPORA]


def test_a_missing_source_and_wrong_options_are_refused(radio_play, tmp_path):
    with pytest.raises(InputError, match=r"with --corpus=radio_play: the folder of the corpus$"):
        prepare_corpus(PrepareOptions("radio_play", data_dir=tmp_path))
    message = "'year' of radio_play: .*'year'; needed: a reader with the arguments partial, year"
    with pytest.raises(InputError, match=message):
        prepare_corpus(PrepareOptions("radio_play", tmp_path, tmp_path, "year"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recording": "1.wav"}, "'u1': recording: str; needed: DecodeRequest, or None if missing"),
        ({"recording": pathlib.PurePosixPath("1.wav")}, "'u1': recording: PurePosixPath; needed"),
        ({"text": None}, "'u1': text: NoneType; needed: str, empty if missing"),
        ({"id": 1}, "1: id: int; needed: str"),
        ({"score": 0.5}, "'u1': score: 0.5; needed: scored=True"),
        ({"label": "y"}, "'u1': label 'y'; allowed: x"),
        ({"ratings": {"y": 1}}, "'u1': ratings of 'y'; allowed: x"),
    ],
)
def test_errors_name_the_utterance_and_the_field(change, message):
    utterance = dataclasses.replace(Utterance("u1", label="x"), **change)
    with pytest.raises(InputError, match=f"c: utterance {message}"):
        Corpus("c", ("x",), {"train": [Dialogue("d", (utterance,))]})


def test_dialogues_and_utterances_are_sequences():
    utterance = Utterance("u1")
    for dialogues, message in [
        (iter([Dialogue("d", (utterance,))]), "c: split 'train': list_iterator; needed: a list"),
        ([Dialogue("d", iter([utterance]))], "c: dialogue 'd': utterances: list_iterator; needed"),
        ([Dialogue(7, (utterance,))], "c: dialogue 7: id: int; needed: str"),
        ([Dialogue("d", (utterance, utterance))], "c: utterance 'u1' is repeated; needed: unique"),
    ]:
        with pytest.raises(InputError, match=message):
            Corpus("c", ("x",), {"train": dialogues})
