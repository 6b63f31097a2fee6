"""From the corpora as released to the batches that are trained on, by the stages a user runs."""

import numpy as np
import pytest

from mister_jax import data, extraction
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.prepare import DecodingOptions, PrepareOptions, prepare_corpus
from tests.data.corpora import write_mosi


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, iemocap_tree, meld_tree, write_wav):
    """A folder with a dataset of each corpus."""
    folder = tmp_path_factory.mktemp("prepared")
    write_mosi(folder / "CMU-MOSI", write_wav)
    trees = {"iemocap": iemocap_tree, "meld": meld_tree, "mosi": folder / "CMU-MOSI"}
    for corpus, tree in trees.items():
        decoding = DecodingOptions(num_workers=0, max_seconds=2)
        prepare_corpus(PrepareOptions(corpus, tree, folder, decoding=decoding, partial=True))
    return folder


@pytest.fixture(scope="module")
def encoders(bert_folder):
    prosody = extraction.ProsodyEncoder(max_seconds=0.5)
    return {"speech": prosody, "text": extraction.load_encoder(str(bert_folder), max_tokens=12)}


@pytest.mark.parametrize("dataset", ["iemocap/six_session1", "meld/clips", "mosi/binary"])
def test_batches_hold_the_turns_of_a_corpus_as_they_were_prepared(prepared, encoders, dataset):
    name = dataset.partition("/")[0]
    for modality, encoder in encoders.items():
        extraction.extract_features(encoder, dataset, f"{name}_{modality}", prepared, quiet=True)
    extraction.merge_features(f"{name}_speech", f"{name}_text", f"{name}_features", prepared)
    stored = DialogueDataset(dataset, prepared)
    for split in stored.splits:
        features = data.load_features(f"{name}_features", split, prepared)
        assert features.class_names == stored.class_names
        dialogues = {dialogue.id: dialogue.utterances for dialogue in stored.dialogues(split)}
        assert features.dialogue_ids == tuple(dialogues)
        seen = {}
        plan = data.BatchPlan(features.lengths, 2)
        for batch in data.batches(features, plan, seed=0, epoch=0, shuffle=False):
            fields = ("row", "mask", "label", "speech_present", "text_present")
            for row, mask, *columns in zip(*(batch[field] for field in fields), strict=True):
                if row >= 0:
                    turns = slice(*features.offsets[[row, row + 1]])
                    told = [column[mask].tolist() for column in columns]
                    rows = zip(features.utterance_ids[turns].tolist(), *told, strict=True)
                    seen[features.dialogue_ids[row]] = list(rows)
        assert seen == {
            dialogue: [
                (turn.id, turn.label, turn.speech_present, turn.text_present) for turn in turns
            ]
            for dialogue, turns in dialogues.items()
        }
        if stored.scored:
            scores = [turn.score for turns in dialogues.values() for turn in turns]
            np.testing.assert_array_equal(features.score, np.float32(scores))
