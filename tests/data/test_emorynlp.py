"""The reader of EmoryNLP: scenes, speakers, and broken files."""

import json

import pytest

from mister_jax.data.corpora.emorynlp import CLASS_NAMES, FILES, RELEASED, read_emorynlp
from mister_jax.errors import InputError


def utterance(id_, emotion="Neutral", speakers=("Ross Geller",), text="Hi."):
    return {
        "utterance_id": id_,
        "speakers": list(speakers),
        "transcript": text,
        "tokens": [["Hi", "."]],
        "emotion": emotion,
    }


def season(*scenes):
    episode = {"episode_id": "s01_e01", "scenes": list(scenes)}
    return {"season_id": "s01", "episodes": [episode]}


def scene(id_, *utterances):
    return {"scene_id": id_, "utterances": list(utterances)}


@pytest.fixture
def emorynlp(tmp_path):
    (tmp_path / "json").mkdir()
    contents = {
        "train": season(
            scene(
                "s01_e02_c01",
                utterance("s01_e02_c01_u002", "Joyful", ("Joey", "Ross")),
                utterance("s01_e02_c01_u001", "Mad", (), "caf\u00e9"),
            ),
            scene("s01_e02_c02"),
        ),
        "validation": season(scene("s01_e15_c01", utterance("s01_e15_c01_u001"))),
        "test": season(scene("s01_e01_c04", utterance("s01_e01_c04_u001", "Scared", text=" "))),
    }
    for split, values in contents.items():
        text = json.dumps(values, ensure_ascii=False)
        (tmp_path / "json" / FILES[split]).write_text(text, encoding="utf-8")
    return tmp_path


def test_scenes_are_dialogues_in_the_order_of_the_file(emorynlp):
    corpus = read_emorynlp(emorynlp, partial=True)
    assert corpus.sizes() == {"train": (1, 2), "validation": (1, 1), "test": (1, 1)}
    (dialogue,) = corpus.splits["train"]
    assert dialogue.id == "s01_e02_c01"
    assert [(turn.id, turn.label, turn.text) for turn in dialogue.utterances] == [
        ("s01_e02_c01_u002", "joyful", "Hi."),
        ("s01_e02_c01_u001", "mad", "caf\u00e9"),
    ]
    assert [dict(turn.metadata) for turn in dialogue.utterances] == [{"speaker": "Joey, Ross"}, {}]
    assert corpus.splits["test"][0].utterances[0].text == ""


def test_a_file_in_cp1252_is_read(emorynlp):
    path = emorynlp / "json" / FILES["train"]
    path.write_bytes(path.read_text(encoding="utf-8").encode("cp1252"))
    corpus = read_emorynlp(emorynlp / "json", partial=True)
    assert corpus.splits["train"][0].utterances[1].text == "caf\u00e9"
    assert corpus.notes[0] == f"{path}: read as cp1252, because it is not UTF-8"


def test_the_published_sizes_are_checked(emorynlp):
    assert sum(count for _, count in RELEASED.values()) == 12_606
    with pytest.raises(InputError, match="train 1 dialogues, 2 utterances instead of 713, 9934"):
        read_emorynlp(emorynlp)


def test_errors_name_the_utterance(emorynlp):
    path = emorynlp / "json" / FILES["test"]
    for contents, message in [
        ("{", r"tst\.json: not JSON \(.*\); needed: episodes with scenes"),
        ("[]", "'episodes' is not a list of objects; needed: EmoryNLP's format"),
        (
            json.dumps(season(scene("s01_e01_c04", utterance("u1", "Happy")))),
            "s01_e01_c04: utterance 1: emotion: 'Happy'; allowed: neutral, joyful, scared, mad, p",
        ),
        (
            json.dumps(season(scene("c", {**utterance("u"), "speakers": "Joey"}))),
            "c: utterance 1: speakers: 'Joey'; allowed: a list of names",
        ),
        (json.dumps(season(scene("c", utterance(None)))), "utterance 1: utterance_id: missing"),
        (json.dumps(season({"scene_id": "c"})), "tst.json: c: 'utterances' is not a list"),
    ]:
        path.write_text(contents)
        with pytest.raises(InputError, match=message):
            read_emorynlp(emorynlp, partial=True)
    path.unlink()
    with pytest.raises(InputError, match=r"no emotion-detection-tst\.json; needed: a folder"):
        read_emorynlp(emorynlp)
    assert len(CLASS_NAMES) == 7
