"""Published classifiers as experts."""

import numpy as np
import pytest

from mister_jax import EmotionRecognizer, extraction
from mister_jax.data.audio import encode_wav
from mister_jax.errors import InputError
from tests.helpers.classifiers import write_speech_classifier, write_text_classifier

UTTERANCES = [{"text": "i am so happy"}, {"text": "you are mad"}, {"text": "we are glad today"}]


@pytest.fixture(scope="module")
def text_model(bert_folder, tmp_path_factory):
    """A classifier for the labels joy, anger and sadness."""
    return str(write_text_classifier(bert_folder, tmp_path_factory.mktemp("text") / "bert")[0])


@pytest.fixture(scope="module")
def speech_model(tmp_path_factory):
    """A classifier for the labels ang, neu, hap and sad."""
    return str(write_speech_classifier(tmp_path_factory.mktemp("speech") / "wav2vec2"))


@pytest.fixture(scope="module")
def clip():
    return (3000 * np.random.default_rng(0).normal(size=8000)).astype(np.int16)


def probabilities(rows):
    return np.array([list(row["probabilities"].values()) for row in rows])


def test_two_models_are_averaged_over_the_emotions_that_they_share(text_model, speech_model, clip):
    text = EmotionRecognizer.from_models(text=text_model)
    speech = EmotionRecognizer.from_models(speech=speech_model)
    assert text.class_names == ("joy", "anger", "sadness")
    assert speech.class_names == ("anger", "neutral", "joy", "sadness")
    both = EmotionRecognizer.from_models(text=text_model, speech=speech_model, speech_weight=3)
    assert both.class_names == ("anger", "joy", "sadness")
    utterance = {"text": "i am so happy", "audio": clip}
    (row,) = both.predict([utterance])
    (text_row,), (speech_row,) = text.predict([utterance]), speech.predict([utterance])
    known = {
        name: value for name, value in speech_row["probabilities"].items() if name != "neutral"
    }
    expected = {
        name: 0.25 * text_row["probabilities"][name] + 0.75 * value / sum(known.values())
        for name, value in known.items()
    }
    assert row["probabilities"] == pytest.approx(expected, abs=1e-5)
    assert row["gate"] == {"speech": 0.75, "text": 0.25, "fusion": 0.0}
    assert row["experts"]["text"] == text_row["emotion"]
    assert row["experts"]["speech"] == max(known, key=known.get)
    assert row["experts"]["fusion"] is None


def test_missing_modalities_do_not_vote(text_model, speech_model, clip):
    both = EmotionRecognizer.from_models(text=text_model, speech=speech_model)
    silence = np.zeros(8000, np.int16)
    rows = both.predict(
        [
            {"text": "so mad"},
            {"audio": clip},
            {"text": "so mad", "audio": silence},
            {"audio": silence},
        ]
    )
    gates = [(row["gate"]["speech"], row["gate"]["text"]) for row in rows]
    assert gates == [(0, 1), (1, 0), (0, 1), (0, 0)]
    assert rows[0]["probabilities"] == rows[2]["probabilities"]
    np.testing.assert_allclose(probabilities(rows).sum(1), 1, atol=1e-5)
    assert rows[3]["probabilities"] == pytest.approx(dict.fromkeys(both.class_names, 1 / 3))


def test_other_utterances_do_not_change_a_prediction(text_model):
    recognizer = EmotionRecognizer.from_models(text=text_model)
    together = probabilities(recognizer.predict(UTTERANCES))
    alone = [probabilities(recognizer.predict([it]))[0] for it in UTTERANCES]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_labels_can_be_mapped_and_added(text_model, speech_model):
    mapped = {"joy": "positive", "anger": "negative", "sadness": "negative"}
    recognizer = EmotionRecognizer.from_models(text=text_model, map_labels=mapped)
    assert recognizer.class_names == ("positive", "negative")
    (row,) = recognizer.predict(UTTERANCES[:1])
    (plain,) = EmotionRecognizer.from_models(text=text_model).predict(UTTERANCES[:1])
    expected = plain["probabilities"]["anger"] + plain["probabilities"]["sadness"]
    assert row["probabilities"]["negative"] == pytest.approx(expected, abs=1e-5)


def test_independent_probabilities_are_divided_by_their_sum(bert_folder, tmp_path):
    folder, _ = write_text_classifier(
        bert_folder, tmp_path / "bert", problem_type="multi_label_classification"
    )
    rows = EmotionRecognizer.from_models(text=str(folder)).predict(UTTERANCES)
    np.testing.assert_allclose(probabilities(rows).sum(1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no models; needed: a text model, a speech model, or both"),
        ({"text": "SPEECH"}, "text_model=.*wav2vec2: a speech model"),
        ({"text": "TEXT", "text_weight": -1}, "text_weight=-1, .*allowed: 0 or more"),
        ({"text": "TEXT", "text_weight": 0}, "more than 0 for one of the models"),
        ({"text": "TEXT", "text_weight": float("nan")}, "more than 0 for one of the models"),
        (
            {"text": "TEXT", "map_labels": {"love": "joy"}},
            "no model has this label; allowed: anger",
        ),
        (
            {
                "text": "TEXT",
                "speech": "SPEECH",
                "map_labels": {"joy": "a", "anger": "b", "sadness": "c"},
            },
            "share no emotion .speech: anger, neutral, joy, sadness; text: a, b, c",
        ),
        (
            {"text": "UNNAMED"},
            "its labels have no names .LABEL_0, LABEL_1, LABEL_2.; name",
        ),
        ({"text": "BASE"}, "no classification head"),
    ],
)
def test_unusable_models_are_explained_in_one_line(
    text_model, speech_model, bert_folder, tmp_path, options, message
):
    unnamed = {str(index): f"LABEL_{index}" for index in range(3)}
    folders = {
        "TEXT": text_model,
        "SPEECH": speech_model,
        "BASE": str(bert_folder),
        "UNNAMED": str(
            write_text_classifier(bert_folder, tmp_path / "unnamed", id2label=unnamed)[0]
        ),
    }
    options = {
        name: folders.get(value, value) if isinstance(value, str) else value
        for name, value in options.items()
    }
    with pytest.raises(InputError, match=message) as error:
        EmotionRecognizer.from_models(**options)
    assert "\n" not in str(error.value)


def test_a_recording_is_predicted_by_published_models(text_model, speech_model, clip, tmp_path):
    encode_wav(tmp_path / "call.wav", np.tile(clip, 4))
    (tmp_path / "call.csv").write_text("start,end,text\n0,0.5,so mad.\n0.6,1.5,so happy.\n")
    recognizer = EmotionRecognizer.from_models(text=text_model, speech=speech_model)
    rows = recognizer.predict_recording(tmp_path / "call.wav")
    assert [row["start"] for row in rows] == [0, 0.6]
    assert set(rows[0]["probabilities"]) == {"anger", "joy", "sadness"}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_probabilities_equal_the_pipelines_of_transformers(text_model, speech_model, clip):
    import transformers

    pipeline = transformers.pipeline("text-classification", text_model, top_k=None)
    rows = EmotionRecognizer.from_models(text=text_model).predict(UTTERANCES)
    for row, results in zip(rows, pipeline([it["text"] for it in UTTERANCES]), strict=True):
        expected = {result["label"]: result["score"] for result in results}
        assert row["probabilities"] == pytest.approx(expected, abs=1e-5)
    pipeline = transformers.pipeline("audio-classification", speech_model, top_k=4)
    (row,) = EmotionRecognizer.from_models(speech=speech_model).predict([{"audio": clip}])
    results = pipeline(clip.astype(np.float32) / 2**15)
    expected = {result["label"]: result["score"] for result in results}
    names = {"anger": "ang", "neutral": "neu", "joy": "hap", "sadness": "sad"}
    actual = {names[name]: value for name, value in row["probabilities"].items()}
    assert actual == pytest.approx(expected, abs=1e-5)


def test_mister_e_trains_on_features_of_the_same_models(text_model, speech_model, clip):
    # Both encoders are loaded from classifiers, without their heads.
    for encoder, utterances in (
        (extraction.load_encoder(text_model, max_tokens=20), ["i am so happy"]),
        (extraction.load_encoder(speech_model), [clip]),
    ):
        features, present = extraction.encode_utterances(encoder, utterances)
        assert present.all() and np.isfinite(features).all()
