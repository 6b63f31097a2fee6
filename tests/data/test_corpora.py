"""The stages from a released corpus to the batches for training."""

import numpy as np
import pytest

from mister_jax import data, extraction
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.prepare import DecodingOptions, PrepareOptions, prepare_corpus
from tests.data.corpora import write_mosi


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, iemocap_folder, meld_folder, write_wav):
    """Folder with a dialogue dataset of each corpus."""
    folder = tmp_path_factory.mktemp("prepared")
    write_mosi(folder / "CMU-MOSI", write_wav)
    sources = {"iemocap": iemocap_folder, "meld": meld_folder, "mosi": folder / "CMU-MOSI"}
    for corpus, source in sources.items():
        decoding = DecodingOptions(num_workers=0, max_seconds=2)
        prepare_corpus(PrepareOptions(corpus, source, folder, decoding=decoding, partial=True))
    return folder


@pytest.fixture(scope="module")
def encoders(bert_folder):
    prosody = extraction.ProsodyEncoder(max_seconds=0.5)
    return {"speech": prosody, "text": extraction.load_encoder(str(bert_folder), max_tokens=12)}


@pytest.mark.parametrize("dataset", ["iemocap/six_session1", "meld/clips", "mosi/binary"])
def test_batches_contain_the_utterances_of_the_prepared_corpus(data_dir, encoders, dataset):
    name = dataset.partition("/")[0]
    for modality, encoder in encoders.items():
        extraction.extract_features(encoder, dataset, f"{name}_{modality}", data_dir, quiet=True)
    extraction.merge_features(f"{name}_speech", f"{name}_text", f"{name}_features", data_dir)
    dialogue_dataset = DialogueDataset(dataset, data_dir)
    for split in dialogue_dataset.splits:
        features = data.load_features(f"{name}_features", split, data_dir)
        assert features.class_names == dialogue_dataset.class_names
        dialogues = {
            dialogue.id: dialogue.utterances for dialogue in dialogue_dataset.dialogues(split)
        }
        assert features.dialogue_ids == tuple(dialogues)
        batched = {}
        plan = data.BatchPlan(features.lengths, 2)
        for batch in data.batches(features, plan, seed=0, epoch=0, shuffle=False):
            fields = ("row", "mask", "label", "speech_present", "text_present")
            for row, mask, *columns in zip(*(batch[field] for field in fields), strict=True):
                if row >= 0:
                    turns = slice(*features.offsets[[row, row + 1]])
                    values = [column[mask].tolist() for column in columns]
                    rows = zip(features.utterance_ids[turns].tolist(), *values, strict=True)
                    batched[features.dialogue_ids[row]] = list(rows)
        assert batched == {
            dialogue: [
                (turn.id, turn.label, turn.speech_present, turn.text_present) for turn in turns
            ]
            for dialogue, turns in dialogues.items()
        }
        if dialogue_dataset.scored:
            scores = [turn.score for turns in dialogues.values() for turn in turns]
            np.testing.assert_array_equal(features.score, np.float32(scores))
