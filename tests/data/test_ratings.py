"""Raters who disagree: reading, storing, training targets, scores, and bad input."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
from flax import nnx

from mister_jax import data, losses, metrics
from mister_jax.data.corpora import iemocap
from mister_jax.data.corpora.manifest.reader import read_manifest
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.feature_files import read_npz, write_feature_file
from mister_jax.data.prepare import DecodingOptions, PrepareOptions, prepare_corpus
from mister_jax.errors import InputError
from mister_jax.evaluation.results import evaluate
from mister_jax.models import MisterE, MisterEConfig
from mister_jax.training.loop import train
from tests.data.corpora import IEMOCAP_HEADER
from tests.helpers.tiny_datasets import write_manifest
from tests.helpers.training import make_tiny_config

TURNS = {
    # id: label, lines of the evaluators, ratings
    "F000": ("neu", ["C-E2:\tNeutral;\t()", "C-E3:\tNeutral state;\t()"], {"neutral": 2}),
    "M000": (
        "xxx",
        ["C-E2:\tAnger;\t()", "C-E3:\tFrustration;\t(annoyed)", "C-E4:\tAnger; Frustration;\t()"],
        {"angry": 1.5, "frustrated": 1.5},
    ),
    "F001": (
        "exc",
        ["C-E1:\tExcited;\t()", "C-E4:\tHappiness; Excited; Surprise;\t()", "C-F1:\tAnger;\t()"],
        {"excited": 4 / 3, "happy": 1 / 3},
    ),
    "M001": ("oth", ["C-E1:\tOther;\t(curious)", "A-E1:\tval 3; act 2; dom 3;\t()"], {}),
    # An evaluator without an emotion, and a comment that is not closed.
    "F002": ("sad", ["C-E1:\t;\t()", "C-E2:\tSadness;\t(low", "C-E4:\tSadness"], {"sad": 2}),
}


def write_session(root, turns, session=2):
    name = f"Ses0{session}F_impro01"
    blocks = [
        "\n".join([f"[{index}.0 - {index}.5]\t{name}_{turn}\t{label}\t[2.5, 2.5, 2.5]", *lines, ""])
        for index, (turn, (label, lines, _)) in enumerate(turns.items())
    ]
    annotation = root / f"Session{session}/dialog/EmoEvaluation/{name}.txt"
    transcript = root / f"Session{session}/dialog/transcriptions/{name}.txt"
    for path in (annotation, transcript):
        path.parent.mkdir(parents=True, exist_ok=True)
    annotation.write_text(IEMOCAP_HEADER + "\n".join(blocks))
    transcript.write_text("".join(f"{name}_{turn} [0-1]: Hello.\n" for turn in turns))
    return annotation


def test_evaluators_of_iemocap_are_counted(tmp_path):
    write_session(tmp_path, TURNS)
    corpus = iemocap.read_iemocap(tmp_path, partial=True)
    ratings = {turn.id.rpartition("_")[2]: turn.ratings for _, turn in corpus.utterances()}
    assert ratings == {name: pytest.approx(expected) for name, (_, _, expected) in TURNS.items()}


def test_merged_classes_add_their_evaluators(tmp_path):
    write_session(tmp_path, TURNS)
    corpus = iemocap.read_iemocap(tmp_path, classes="four", partial=True)
    ratings = {turn.id.rpartition("_")[2]: turn.ratings for _, turn in corpus.utterances()}
    assert ratings["F001"] == pytest.approx({"happy": 1 + 2 / 3})
    assert ratings["M000"] == pytest.approx({"angry": 1.5})


def test_ratings_are_stored_for_turns_without_a_majority(tmp_path, write_wav):
    for session in (1, 2, 5):
        write_session(tmp_path, TURNS, session)
        for turn in TURNS:
            name = f"Ses0{session}F_impro01"
            write_wav(tmp_path / f"Session{session}/sentences/wav/{name}/{name}_{turn}.wav")
    prepare_corpus(
        PrepareOptions(
            "iemocap",
            tmp_path,
            tmp_path / "data",
            "six_session1",
            decoding=DecodingOptions(0),
            partial=True,
        )
    )
    dataset = DialogueDataset("iemocap/six_session1", tmp_path / "data")
    (dialogue,) = dataset.dialogues("train")
    stored = [
        (turn.label, dict(zip(dataset.class_names, turn.ratings.tolist(), strict=True)))
        for turn in dialogue.utterances
    ]
    for (label, ratings), (name, _, expected) in zip(stored, TURNS.values(), strict=True):
        assert (label < 0) == (name in ("xxx", "oth"))
        assert {key: value for key, value in ratings.items() if value} == pytest.approx(expected)


@pytest.mark.parametrize("line", ["C-E2:\tJoyful;\t()", "C-E2:\tAnger, Fear;\t()", "C-E2 Anger"])
def test_line_of_an_evaluator_that_cannot_be_read_is_an_error(tmp_path, line):
    path = write_session(tmp_path, {"F000": ("neu", [line], {})})
    with pytest.raises(InputError, match=r"Ses02F_impro01\.txt: line \d+: .* needed: an evaluator"):
        iemocap.read_turns(path)


def test_manifest_has_counts_per_class(tmp_path):
    rows = [
        {"label": "sad", "ratings": {"sad": 2, "happy": 1}},
        {"ratings": {"happy": 3, "sad": 1}},  # The majority becomes the label.
        {"ratings": {"happy": 1, "sad": 1}},  # There is no majority.
        {"ratings": '{"calm": 2}'},  # Text, as in a CSV file.
        {},
    ]
    rows = [
        {"dialogue": "d", "utterance": index, "order": index, "text": "Hi.", **row}
        for index, row in enumerate(rows)
    ]
    corpus = read_manifest(write_manifest(tmp_path / "m.jsonl", rows), check_labels=False)
    turns = [turn for _, turn in corpus.utterances()]
    assert corpus.class_names == ("calm", "happy", "sad") and corpus.rated
    assert [turn.label for turn in turns] == ["sad", "happy", None, "calm", None]
    assert turns[0].ratings == {"sad": 2, "happy": 1} and turns[4].ratings == {}


@pytest.mark.parametrize(
    "ratings", [["happy"], {"happy": -1}, {"happy": "2"}, {"": 1}, {"happy": True}, "two", 3]
)
def test_invalid_ratings_of_a_manifest_are_one_line(tmp_path, ratings):
    row = {"dialogue": "d", "utterance": 1, "order": 1, "text": "Hi.", "ratings": ratings}
    with pytest.raises(InputError, match=r"ratings: .* allowed: an object that maps") as raised:
        read_manifest(write_manifest(tmp_path / "m.jsonl", [row]))
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def rated_splits():
    splits = data.generate_features(
        seed=2,
        num_dialogues={"train": 10, "validation": 4, "test": 4},
        num_classes=3,
        speech_dim=3,
        text_dim=4,
    )
    random = np.random.default_rng(0)
    rated = {}
    for name, split in splits.items():
        one_hot = np.eye(3)[np.maximum(split.label, 0)] * (split.label >= 0)[:, None]
        ratings = 2 * one_hot + random.integers(0, 2, one_hot.shape)
        label = split.label.copy()
        label[::5] = -1  # rated, but unlabeled
        ratings[1] = 0
        rated[name] = dataclasses.replace(split, label=label, ratings=ratings.astype(np.float32))
    return rated


def test_feature_files_and_datasets_keep_ratings(rated_splits, tmp_path):
    data.write_features(rated_splits, "rated", tmp_path)
    write_feature_file(tmp_path / "rated.npz", rated_splits)
    from_file = read_npz(tmp_path / "rated.npz")
    for name, expected in rated_splits.items():
        loaded = data.load_features("rated", name, tmp_path)
        np.testing.assert_array_equal(loaded.ratings, expected.ratings)
        np.testing.assert_array_equal(from_file[name].ratings, expected.ratings)
    changed = dataclasses.replace(expected, ratings=expected.ratings + 1)
    assert changed.fingerprint() != expected.fingerprint()


@pytest.mark.parametrize(
    ("ratings", "message"),
    [
        (np.ones((4, 2)), "2 columns; allowed: 3, as in class_names"),
        (-np.ones((4, 3)), "row 0 .* allowed: numbers of raters, 0 or more"),
        (np.full((4, 3), np.nan), "allowed: numbers of raters"),
    ],
)
def test_invalid_ratings_of_a_feature_file_are_one_line(tmp_path, ratings, message):
    np.savez(
        tmp_path / "f.npz",
        utterance=np.arange(4),
        dialogue=np.arange(4),
        position=np.zeros(4),
        label=np.zeros(4, int),
        class_names=np.array(["a", "b", "c"]),
        text=np.ones((4, 2), np.float32),
        split=np.array(["train"] * 4),
        ratings=ratings,
    )
    with pytest.raises(InputError, match=f"ratings: .*{message}" if "row" in message else message):
        read_npz(tmp_path / "f.npz")


@pytest.fixture(scope="module")
def output_and_mask():
    config = MisterEConfig(
        num_classes=3,
        speech_dim=3,
        text_dim=4,
        context_dim=4,
        gru_layers=0,
        kernel_sizes=(1,),
        fusion_dim=4,
        fusion_layers=1,
        attention_dim=3,
    )
    random = np.random.default_rng(1)
    mask = np.array([[True] * 4, [True, True, False, False]])
    model = MisterE(config, rngs=nnx.Rngs(0))
    speech, text = (random.normal(size=(2, 4, dim)).astype(np.float32) for dim in (3, 4))
    return nnx.jit(model)(speech, text, mask), mask


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("class_weights", [None, np.array([1.0, 2.0, 0.5], np.float32)])
def test_unanimous_raters_give_the_loss_of_the_labels(output_and_mask, gamma, class_weights):
    output, mask = output_and_mask
    labels = np.array([[0, 1, 2, 1], [2, 0, -1, -1]])
    ratings = 3 * np.eye(3)[np.maximum(labels, 0)]
    ratings[0, 1] = 0  # Without ratings, the label is the target.

    @jax.jit
    def total(ratings):
        options = {"gamma": gamma, "class_weights": class_weights, "ratings": ratings}
        return losses.mister_e(output, labels, mask, **options)[0]

    expected, actual = total(None), total(ratings)
    assert float(actual) == pytest.approx(float(expected), rel=1e-6)


def test_loss_is_the_cross_entropy_to_the_distribution_of_the_raters(output_and_mask):
    output, mask = output_and_mask
    labels = np.full(mask.shape, -1)  # no majority
    ratings = np.random.default_rng(0).integers(0, 4, (*mask.shape, 3)).astype(float)
    ratings[0, 2] = 0
    loss = functools.partial(losses.mister_e, gamma=0.0)
    _, parts = jax.jit(loss)(output, labels, mask, ratings=ratings)
    counted = mask & (ratings.sum(-1) > 0)
    q = ratings[counted] / ratings[counted].sum(-1, keepdims=True)
    log_p = np.log(scipy.special.softmax(np.asarray(output.logits, float)[counted], -1))
    assert float(parts["mixture"]) == pytest.approx(-(q * log_p).sum(-1).mean(), rel=1e-5)
    assert float(parts["contrastive"]) == 0  # The contrastive loss needs labels.


def test_scores_equal_those_of_scipy_and_hand_made_agreement():
    ratings = np.array([[3.0, 0, 0], [1, 1, 1], [0, 2, 1], [0, 0, 0], [0, 0, 1]])
    random = np.random.default_rng(0)
    probabilities = scipy.special.softmax(random.normal(size=(5, 3)), -1)
    scores = metrics.rater_scores(ratings, probabilities)
    rows = [0, 1, 2, 4]
    q = ratings[rows] / ratings[rows].sum(-1, keepdims=True)
    p = probabilities[rows]
    assert scores["kl_divergence"] == pytest.approx(scipy.stats.entropy(q, p, axis=1).mean())
    distances = [scipy.spatial.distance.jensenshannon(*pair) for pair in zip(q, p, strict=True)]
    assert scores["js_divergence"] == pytest.approx(np.square(distances).mean())
    chosen = [ratings[row, probabilities[row].argmax()] > 0 for row in rows]
    assert scores["any_rater_accuracy"] == np.mean(chosen)
    # Three utterances have three raters each: 3, 0 and 1 of their three pairs of raters agree.
    agreement = (1 + 0 + 1 / 3) / 3
    chance = (4 / 9) ** 2 + (3 / 9) ** 2 + (2 / 9) ** 2
    assert scores["rater_agreement"] == pytest.approx(agreement)
    assert scores["fleiss_kappa"] == pytest.approx((agreement - chance) / (1 - chance))
    assert scores["utterances"] == 4
    assert metrics.rater_scores(np.zeros((2, 3)), p[:2]) == {"utterances": 0}


def test_agreement_leaves_out_divided_raters():
    ratings = np.array([[2.0, 0, 0], [0, 2, 0], [1, 1 / 3, 1 / 3]], np.float32)
    scores = metrics.rater_scores(ratings, np.full((3, 3), 1 / 3))
    assert scores["rater_agreement"] == scores["fleiss_kappa"] == pytest.approx(1)
    assert metrics.rater_scores(ratings[2:], np.ones((1, 3)) / 3)["rater_agreement"] is None


def test_training_on_ratings_is_scored_against_the_raters(rated_splits, tmp_path):
    data.write_features(rated_splits, "rated", tmp_path)
    config = make_tiny_config(
        tmp_path,
        "rated",
        **{"loss.target": "ratings", "model.experts": ("text",), "train.epochs": 1},
    )
    assert train(config, tmp_path / "run", quiet=True).finished
    scores = evaluate(tmp_path / "run", "test", report=True, quiet=True)
    test = rated_splits["test"]
    assert scores["raters"]["utterances"] == (test.ratings.sum(-1) > 0).sum()
    assert scores["utterances"] == (test.label >= 0).sum() < scores["raters"]["utterances"]
    rows = (tmp_path / "run/predictions.jsonl").read_text().splitlines()
    probabilities = np.array([list(json.loads(row)["probabilities"].values()) for row in rows])
    expected = metrics.rater_scores(test.ratings, probabilities)
    assert scores["raters"]["kl_divergence"] == pytest.approx(expected["kl_divergence"], abs=1e-4)
    assert "Fleiss" in (tmp_path / "run/report.html").read_text()


def test_target_needs_a_dataset_with_ratings(tiny_data_dir, tmp_path):
    config = make_tiny_config(tiny_data_dir, **{"loss.target": "ratings"})
    with pytest.raises(InputError, match="dataset tiny has no ratings; allowed: label"):
        train(config, tmp_path, quiet=True)
    config = make_tiny_config(tiny_data_dir, **{"loss.target": "votes"})
    with pytest.raises(InputError, match="target"):
        train(config, tmp_path, quiet=True)
