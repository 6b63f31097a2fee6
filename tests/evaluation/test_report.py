"""Tests the HTML report: its numbers, its optional sections, and its script in a browser."""

import dataclasses
import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import sklearn.metrics

from mister_jax import data, metrics
from mister_jax.data.utterances import Utterances
from mister_jax.evaluation.calibration import calibration_scores
from mister_jax.evaluation.comparison import compare_predictions
from mister_jax.evaluation.confidence_intervals import DialogueBootstrap, Estimate
from mister_jax.evaluation.report import (
    Experiment,
    read_utterance_texts,
    report_html,
    write_report,
)
from mister_jax.evaluation.report.page import dialogue_data
from mister_jax.evaluation.report.statistics import (
    abstention,
    calibration,
    class_scores,
    mean_gates,
    risk_coverage,
    score_models,
)
from mister_jax.evaluation.scores import score_predictions
from mister_jax.evaluation.split_predictions import SplitPredictions
from mister_jax.io import embedded_json

CLASSES = ("anger", "joy", "neutral")
EXPERIMENT = Experiment(
    name="run <1>",
    config={"task": "fusion", "data": {"name": "tiny", "data_dir": "/x"}},
    epochs=(3,),
)
SCRIPT_INJECTION = "</script><script>document.title = 'broken'</script><!--<script>& \u2028"


def make_split(num_dialogues=8, seed=0, unlabeled=0.1, length=6):
    """Returns a random split and predictions that are mostly correct."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, length, num_dialogues)
    total = int(lengths.sum())
    label = np.where(random.random(total) < unlabeled, -1, random.integers(3, size=total))
    speech_present = random.random(total) < 0.8
    features = data.DialogueFeatures(
        name="tiny",
        split="test",
        class_names=CLASSES,
        dialogue_ids=tuple(f"d{index}" for index in range(num_dialogues)),
        lengths=lengths,
        utterance_ids=np.array([f"u{index}" for index in range(total)]),
        speech=np.zeros((total, 1), np.float32),
        text=np.zeros((total, 1), np.float32),
        speech_present=speech_present,
        text_present=np.ones(total, bool),
        label=label.astype(np.int32),
        metadata={"reference_scores": {"bayes": {"weighted_f1": 0.9, "accuracy": 0.91}}},
    )
    logits = random.normal(size=(total, 3)) + 2 * np.eye(3)[label] * (label >= 0)[:, None]
    present = np.stack([speech_present, np.ones(total, bool), np.ones(total, bool)], axis=-1)
    gate = random.random((total, 3)) * present
    choices = np.where(random.random((total, 3)) < 0.6, label[:, None] % 3, 1)
    predictions = {
        "probabilities": np.exp(logits) / np.exp(logits).sum(-1, keepdims=True),
        "gate": gate / gate.sum(-1, keepdims=True),
        "expert_probabilities": np.eye(3)[choices],
        "expert_present": present,
    }
    return features, predictions


def render(features, predictions, **options):
    split = SplitPredictions.from_features(features, predictions)
    return report_html(split, score_predictions(features, predictions), EXPERIMENT, **options)


class Page(html.parser.HTMLParser):
    """Collects the ids, addresses, scripts and table rows of a page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.addresses, self.rows, self.scripts = set(), [], {}, 0
        self._table, self._in_cell = None, False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.scripts += tag == "script"
        if "id" in attributes:
            assert attributes["id"] not in self.ids
            self.ids.add(attributes["id"])
        self.addresses += [attributes[key] for key in ("src", "href") if key in attributes]
        if tag == "table":
            self._table = self.rows.setdefault(attributes.get("class"), [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, text):
        if self._in_cell:
            self._table[-1][-1] += f"{text} "


def embedded_data(text):
    (content,) = re.findall(
        r'<script type="application/json" id="report-data">(.*?)</script>', text
    )
    return json.loads(content)


def test_page_shows_the_scores_of_metrics():
    features, predictions = make_split()
    expected = score_predictions(features, predictions)
    rows = {row[0].strip(): row[1:] for row in Page(render(features, predictions)).rows["models"]}
    assert rows["this model"][0].startswith(f"{expected['weighted_f1']:.3f}")
    assert rows["majority class"][0].startswith(f"{expected['majority']['weighted_f1']:.3f}")
    assert rows["bayes (reference)"][0].startswith("0.900")
    # The page also scores the mean of the present experts' logits, which has the same largest class
    # as the sum of their log-probabilities.
    log_p = (
        np.log(predictions["expert_probabilities"].clip(1e-30))
        * predictions["expert_present"][..., None]
    )
    labeled = features.label >= 0
    mean = sklearn.metrics.f1_score(
        features.label[labeled], log_p.sum(1).argmax(-1)[labeled], average="weighted"
    )
    assert expected["without_gate"]["weighted_f1"] == pytest.approx(mean)
    assert rows["mean of the experts, without the gate"][0].startswith(f"{mean:.3f}")
    for name, expert in expected["experts"].items():
        assert rows[f"{name} alone"][0].startswith(f"{expert['weighted_f1']:.3f}")
        assert rows[f"{name} alone"][-1].strip() == str(expert["utterances"])


def test_page_shows_class_scores_confusion_and_calibration_of_metrics():
    features, predictions = make_split()
    expected = score_predictions(features, predictions)
    text = render(features, predictions)
    tables = Page(text).rows
    for row, name, counts in zip(
        tables["classes"][1:], CLASSES, expected["confusion"], strict=True
    ):
        class_scores = expected["per_class"][name]
        assert row[:2] == [f"{name} ", f"{class_scores['support']} "]
        for cell, key in zip(row[2:5], ("precision", "recall", "f1"), strict=True):
            assert cell.startswith(f"{class_scores[key]:.3f}")
        (cells,) = (line for line in tables["confusion"][1:] if line[0].strip() == name)
        assert [int(cell.split()[0]) for cell in cells[1:-1]] == counts
    assert f"<strong>{expected['calibration_error']:.3f}</strong>" in text


def test_intervals_contain_the_score_shrink_with_data_and_are_deterministic():
    widths = []
    for count in (10, 40, 160):
        features, predictions = make_split(count)
        split = SplitPredictions.from_features(features, predictions)
        first, again = (
            score_models(split, DialogueBootstrap(split), {})[0].scores for _ in range(2)
        )
        assert first == again
        for score in first.values():
            assert score.low <= score.value <= score.high
        widths.append(first["weighted_f1"].high - first["weighted_f1"].low)
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 2 * widths[-1] > 0


def test_duplicated_utterances_do_not_narrow_the_intervals():
    features, predictions = make_split(30, unlabeled=0)
    rows = np.repeat(np.arange(len(features.label)), 4)
    duplicated = dataclasses.replace(
        features,
        lengths=features.lengths * 4,
        utterance_ids=np.array([f"t{index}" for index in range(len(rows))]),
        **{
            field: getattr(features, field)[rows]
            for field in ("speech", "text", "speech_present", "text_present", "label")
        },
    )
    duplicated_predictions = {name: values[rows] for name, values in predictions.items()}
    intervals = []
    for one_features, one_predictions in (
        (features, predictions),
        (duplicated, duplicated_predictions),
    ):
        split = SplitPredictions.from_features(one_features, one_predictions)
        estimates = score_models(split, DialogueBootstrap(split), {})[0].scores.values()
        intervals.append([end for estimate in estimates for end in (estimate.low, estimate.high)])
    assert intervals[0] == pytest.approx(intervals[1])


def test_a_single_dialogue_has_no_interval():
    features, predictions = make_split(1, unlabeled=0)
    text = render(features, predictions)
    assert "There is only one labeled dialogue" in text
    assert 'class="interval"' not in text and "nan" not in Page(text).rows["models"][1][1]


def test_an_expert_is_compared_on_the_utterances_that_have_its_modality():
    features, predictions = make_split()
    split = SplitPredictions.from_features(features, predictions)
    models = {model.name: model for model in score_models(split, DialogueBootstrap(split), {})}
    has_speech = split.labeled & features.speech_present
    expert_f1, model_f1 = (
        metrics.confusion_scores(
            np.bincount(split.label[has_speech] * 3 + predicted[has_speech], minlength=9).reshape(
                3, 3
            )
        )["weighted_f1"]
        for predicted in (split.votes[:, 0], split.predicted)
    )
    assert models["speech"].utterances == has_speech.sum() < split.labeled.sum()
    assert models["speech"].difference.value == pytest.approx(expert_f1 - model_f1)


def test_calibration_bins_have_intervals():
    features, predictions = make_split(20)
    split = SplitPredictions.from_features(features, predictions)
    error, bins = calibration(split, DialogueBootstrap(split))
    assert error == score_predictions(features, predictions)["calibration_error"]
    assert sum(part.utterances for part in bins) == split.labeled.sum()
    for part in bins:
        assert part.low <= part.confidence <= part.high
        assert part.accuracy.low <= part.accuracy.value <= part.accuracy.high


def test_calibration_scores_have_intervals_and_equal_their_definitions():
    features, predictions = make_split(40)
    split = SplitPredictions.from_features(features, predictions)
    scores = calibration_scores(split, DialogueBootstrap(split))
    expected = score_predictions(features, predictions)
    assert tuple(scores) == metrics.CALIBRATION_SCORES
    for name in ("calibration_error", "brier_score"):
        assert scores[name].value == pytest.approx(expected[name], rel=1e-6)
    labeled = features.label >= 0
    nll = sklearn.metrics.log_loss(
        features.label[labeled], predictions["probabilities"][labeled], labels=[0, 1, 2]
    )
    assert scores["negative_log_likelihood"].value == pytest.approx(nll, rel=1e-5)
    for name in ("brier_score", "negative_log_likelihood"):
        assert scores[name].low < scores[name].value < scores[name].high


def test_page_shows_scores_before_and_after_calibration():
    features, predictions = make_split()
    estimate = {"value": 0.125, "low": 0.0625, "high": None}
    summary = {
        version: dict.fromkeys(metrics.CALIBRATION_SCORES, estimate)
        for version in ("uncalibrated", "calibrated")
    }
    split = SplitPredictions.from_features(features, predictions)
    for bias, text in ((None, "temperature 1.250."), ({"<joy>": 0.5}, "biases: &lt;joy&gt; +0.50")):
        scores = {"calibration": {"temperature": 1.25, "bias": bias, **summary}}
        page = report_html(split, scores, EXPERIMENT)
        assert text in page and "not calibrated" not in page
    scores = {"calibration": {"uncalibrated": summary["uncalibrated"]}}
    assert "not calibrated" in report_html(split, scores, EXPERIMENT)


def test_fewer_utterances_are_kept_above_higher_confidences():
    features, predictions = make_split(30)
    split = SplitPredictions.from_features(features, predictions)
    rows = abstention(split, DialogueBootstrap(split))
    assert rows[0].min_confidence == 0 and rows[0].coverage.value == 1
    for row in rows[1:]:
        kept = (predictions["probabilities"].max(-1) >= row.min_confidence) & split.labeled
        assert row.coverage.value == pytest.approx(kept.sum() / split.labeled.sum())
        assert row.accuracy.value == pytest.approx(1 - split.wrong[kept].mean())
        assert row.coverage.low <= row.coverage.value <= row.coverage.high
    assert (np.diff([row.coverage.value for row in rows]) <= 0).all()
    curve = risk_coverage(split)
    assert curve.error == pytest.approx(split.wrong.sum() / split.labeled.sum())
    assert curve.best_area < curve.area < curve.error
    page = Page(render(features, predictions))
    assert "abstention" in page.ids


def test_mean_gate_is_grouped_by_class_and_outcome():
    features, predictions = make_split()
    split = SplitPredictions.from_features(features, predictions)
    rows = mean_gates(split)
    assert sum(count for name, _, count, _ in rows if name) == split.labeled.sum()
    chosen = (split.label == 1) & (split.predicted == 1)
    (gate,) = (gate for name, outcome, _, gate in rows if (name, outcome) == ("joy", "correct"))
    np.testing.assert_allclose(gate, predictions["gate"][chosen].mean(0))


def test_page_is_self_contained():
    text = render(*make_split())
    page = Page(text)
    assert page.addresses and all(address.startswith("#") for address in page.addresses)
    assert {address[1:] for address in page.addresses} <= page.ids
    assert (
        "@import" not in text
        and "url(" not in text
        and "http" not in text.replace("http-equiv", "")
    )
    assert page.scripts == 2


def test_texts_and_names_are_escaped():
    features, predictions = make_split()
    features = dataclasses.replace(
        features,
        class_names=("anger", "joy", "<b>&"),
        dialogue_ids=(SCRIPT_INJECTION, *features.dialogue_ids[1:]),
    )
    text = render(features, predictions, texts={"u0": SCRIPT_INJECTION})
    page = Page(text)
    assert page.scripts == 2
    page_data = embedded_data(text)
    assert page_data["texts"][0] == page_data["dialogues"][0] == SCRIPT_INJECTION
    assert "&lt;b&gt;&amp;" in text and "<b>" not in text
    assert "run &lt;1&gt;" in text and "/x" not in text


def test_embedded_json_has_no_markup():
    text = embedded_json({SCRIPT_INJECTION: SCRIPT_INJECTION})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {SCRIPT_INJECTION: SCRIPT_INJECTION}


def test_data_of_a_large_split_stays_small():
    features, predictions = make_split(1300, length=20)
    split = SplitPredictions.from_features(features, predictions)
    size = len(embedded_json(dialogue_data(split, {})))
    assert len(features.label) > 12_000
    assert size < 60 * len(features.label)


def remove_gate(kind, predictions):
    present = predictions["expert_present"]
    if kind == "mean":
        return {**predictions, "gate": present / present.sum(-1, keepdims=True)}
    if kind == "one expert":
        only = np.array([False, True, False]) & np.ones_like(present)
        return {**predictions, "gate": only.astype(float), "expert_present": only}
    return {"probabilities": predictions["probabilities"]}


@pytest.mark.parametrize("kind", ["mean", "one expert", "probabilities"])
def test_sections_without_data_are_left_out(kind):
    features, predictions = make_split()
    text = render(features, remove_gate(kind, predictions))
    page = Page(text)
    votes = kind == "mean"
    assert "gate" not in page.ids and "gates" not in page.rows
    assert ("alone" in text.partition("<section")[2].partition("<noscript>")[0]) == votes
    page_data = embedded_data(text)
    assert page_data["gate"] is None
    assert page_data["experts"] == (["speech", "text", "fusion"] if votes else [])
    assert {"scores", "classes", "confusion", "calibration", "dialogues"} <= page.ids


def test_a_split_without_labels_still_shows_its_dialogues():
    features, predictions = make_split(unlabeled=1.1)
    page = Page(report_html(SplitPredictions.from_features(features, predictions), {}, EXPERIMENT))
    assert "dialogues" in page.ids
    assert not {"scores", "confusion", "calibration", "abstention", "gate"} & page.ids


def test_single_utterances_are_grouped_by_dialogue():
    tokens = Utterances(
        name="tiny",
        split="test",
        class_names=CLASSES,
        dialogue_ids=("b", "b", "a", "b"),
        utterance_ids=np.array(["b0", "b1", "a0", "b2"]),
        items=(np.zeros(1, np.int32),) * 4,
        label=np.array([0, 1, 2, -1], np.int32),
    )
    split = SplitPredictions.from_features(tokens, {"probabilities": np.eye(3)[[0, 1, 1, 2]]})
    assert DialogueBootstrap(split).dialogues.tolist() == [0, 1]
    page_data = dialogue_data(split, {})
    assert page_data["dialogues"] == ["b", "a"] and page_data["offsets"] == [0, 3, 4]
    assert page_data["utterances"] == ["b0", "b1", "b2", "a0"]
    assert page_data["predicted"] == [0, 1, 2, 1]


def test_resamples_without_a_class_do_not_widen_its_interval():
    # Only dialogue 0 has the rare class 2, which is always predicted correctly.
    label = np.tile([0, 1], 50)
    label[:3] = 2
    split = SplitPredictions(
        dataset="tiny",
        split="test",
        class_names=CLASSES,
        dialogue_ids=tuple(map(str, range(10))),
        dialogue_index=np.repeat(np.arange(10), 10),
        utterance_ids=np.arange(100).astype(str),
        label=label,
        predicted=np.where(label == 2, 2, 0),
        probabilities=np.eye(3)[np.where(label == 2, 2, 0)],
        experts=(),
        votes=np.zeros((100, 0), int),
        gate=None,
    )
    rare = class_scores(split, DialogueBootstrap(split))[CLASSES[2]]
    assert [rare[name] for name in ("precision", "recall", "f1")] == [Estimate(1.0, 1.0, 1.0)] * 3
    without_rare = dataclasses.replace(split, predicted=np.zeros(100, int))
    compared = compare_predictions(split, without_rare)["per_class"][CLASSES[2]]
    assert compared["difference"] == {"value": -1.0, "low": -1.0, "high": -1.0}


def test_texts_of_an_unavailable_dataset_are_left_out(tmp_path):
    features, _ = make_split()
    assert read_utterance_texts(features, tmp_path) == {}
    features.metadata["text"] = {"dataset": "elsewhere/text"}
    assert read_utterance_texts(features, tmp_path) == {}


MISSING_MODALITY_STUDY = {
    "split": "test",
    "complete": 0.6,
    "points": [
        {
            "drop_speech": speech,
            "drop_text": text,
            "weighted_f1": score,
            "deviation": deviation,
            "loss": {"value": 0.6 - score, "low": low, "high": high},
        }
        for speech, text, score, deviation, low, high in (
            (0.5, 0.0, 0.5, 0.01, 0.05, 0.15),
            (0.0, 0.5, 0.3, 0.02, 0.21, 0.38),
            (0.2, 0.2, 0.45, 0.0, None, None),
        )
    ],
}


def test_missing_modality_section_requires_a_study(tmp_path):
    features, predictions = make_split()
    split_scores = score_predictions(features, predictions)
    path = write_report(tmp_path, features, predictions, split_scores, EXPERIMENT)
    assert "missing" not in Page(path.read_text()).ids
    path = write_report(
        tmp_path, features, predictions, split_scores, EXPERIMENT, study=MISSING_MODALITY_STUDY
    )
    page = Page(path.read_text())
    assert path.name == "report.html" and "missing" in page.ids
    text = path.read_text()
    assert "0.450 ± 0.000" in text
    assert "0.210" in text and "0.380" in text


def test_ensemble_of_seeds_is_described():
    features, predictions = make_split()
    split_scores = score_predictions(features, predictions)
    split_scores["seeds"] = {
        "of_each": {"3": {"weighted_f1": 0.5}, "4": {"weighted_f1": 0.7}},
        "mean": {"weighted_f1": 0.6},
        "deviation": {"weighted_f1": 0.1414},
    }
    config = {"seed": 3, "train": {"epochs": 9, "select_by": "last"}}
    experiment = Experiment(name="run", config=config, epochs=(7, 9))
    text = report_html(
        SplitPredictions.from_features(features, predictions), split_scores, experiment
    )
    assert "an ensemble of 2 seeds. A single seed reaches weighted F1 0.600 ± 0.141" in text
    assert "seeds 3, 4" in text and "epochs 7, 9 of 9<" in text


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WALK = """
const out = {errors: window.failures, seen: []};
const find = (id) => document.getElementById(id);
const turns = () => document.querySelectorAll("#turns > li");
const press = (key, target) => target.dispatchEvent(
  new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const note = (what) => out.seen.push(
  [what, find("choice").selectedIndex, turns().length, find("position").textContent]);
note("start");
out.text = document.querySelector("#turns .transcript").textContent;
out.title = document.title;
find("next").click(); note("next");
find("previous").click(); note("previous");
find("previous").click(); note("before the first");
press("ArrowRight", document.body); note("arrow");
turns()[0].focus(); press("ArrowDown", turns()[0]);
out.down = [...turns()].indexOf(document.activeElement);
out.probabilities = getComputedStyle(document.activeElement.querySelector(".probabilities"))
  .visibility;
press("Escape", document.activeElement);
out.quiet = getComputedStyle(document.activeElement.querySelector(".probabilities")).visibility;
press("ArrowRight", document.activeElement); note("arrow in the list");
out.focus = [...turns()].indexOf(document.activeElement);
find("choice").selectedIndex = 0; find("choice").dispatchEvent(new Event("change")); note("choice");
find("only-errors").click(); note("errors");
out.options = find("choice").options.length;
out.wide = document.documentElement.scrollWidth > window.innerWidth;
document.body.innerHTML = "";
document.body.append(Object.assign(document.createElement("pre"),
  {id: "result", textContent: JSON.stringify(out)}));
"""


def dump(path, folder):
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={folder}", "--window-size=500,900",
            "--virtual-time-budget=3000", "--dump-dom", path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.parity
@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("kind", ["gate", "probabilities"])
def test_browser_shows_the_dialogues(tmp_path, kind):
    features, predictions = make_split(unlabeled=0, length=9)
    features = dataclasses.replace(features, lengths=np.sort(features.lengths)[::-1])
    if kind != "gate":
        predictions = remove_gate(kind, predictions)
    split = SplitPredictions.from_features(features, predictions)
    text = render(
        features, predictions, texts={"u0": SCRIPT_INJECTION}, study=MISSING_MODALITY_STUDY
    )
    # The page's content security policy allows only the page's script, so allow the test's too.
    text = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", text)
    watch = "window.failures = []; window.onerror = (message) => window.failures.push(message);"
    text = text.replace("<head>", f"<head><script>{watch}</script>", 1)
    # Until the page has the focus, no element matches `:focus`.
    wait = "const wait = (n) => document.hasFocus() || !n ? walk() : setTimeout(wait, 20, n - 1);"
    script = f"const walk = () => {{ {WALK} }}; {wait} wait(100);"
    text = text.replace("</body>", f"<script>{script}</script></body>")
    path = tmp_path / "report.html"
    path.write_text(text)
    dom = dump(path, tmp_path / "profile")
    result = re.search(r'<pre id="result">(.*?)</pre>', dom, re.DOTALL)
    assert result, dom[-2000:]
    outcome = json.loads(html.unescape(result[1]))
    assert outcome["errors"] == []
    assert outcome["text"] == SCRIPT_INJECTION and outcome["title"] != "broken"
    lengths, wrong = features.lengths, np.bincount(split.dialogue_index[split.wrong], minlength=8)
    expected = [
        ("start", 0), ("next", 1), ("previous", 0), ("before the first", 0), ("arrow", 1),
        ("arrow in the list", 2), ("choice", 0),
    ]  # fmt: skip
    for (what, index), seen in zip(expected, outcome["seen"][:-1], strict=True):
        said = f"{wrong[index]} wrong" if wrong[index] else "none wrong"
        assert seen[:3] == [what, index, lengths[index]]
        assert seen[3].startswith(f"Dialogue {index + 1} of 8") and seen[3].endswith(said)
    assert outcome["options"] == (wrong > 0).sum()
    assert outcome["down"] == 1 and outcome["focus"] == 0
    assert (outcome["probabilities"], outcome["quiet"]) == ("visible", "hidden")
    assert not outcome["wide"]


@pytest.mark.parity
@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_browser_blocks_injected_scripts(tmp_path):
    text = render(*make_split())
    foreign = "<script>document.title = 'foreign'</script></body>"
    path = tmp_path / "report.html"
    path.write_text(text.replace("</body>", foreign))
    dom = dump(path, tmp_path / "profile")
    assert "Dialogue 1 of 8" in dom
    assert "<title>foreign" not in dom
