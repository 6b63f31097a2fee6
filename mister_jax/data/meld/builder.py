"""MELD as a TFDS dataset."""

import dataclasses
import pathlib
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from mister_jax.data.builder import DialogueBuilder
from mister_jax.data.corpus import Corpus
from mister_jax.data.meld import reader

_URL = "https://raw.githubusercontent.com/declare-lab/MELD/master/data/MELD"


@dataclasses.dataclass
class MeldConfig(tfds.core.BuilderConfig):
    """Options of `reader.read`."""

    clips: bool = True
    corrected_test_clips: bool = False


class Meld(DialogueBuilder):
    """Scenes from a television series, seven emotions."""

    BUILDER_CONFIGS: ClassVar = [
        MeldConfig(name="clips", description="Speech from the released clips, and text."),
        MeldConfig(
            name="corrected_test_clips",
            description="Like clips, with the corrected cuts of test clips where there are any.",
            corrected_test_clips=True,
        ),
        MeldConfig(name="text", description="Text alone; needs no clips.", clips=False),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"""
    Unpack MELD.Raw.tar.gz of https://affective-meld.github.io, and the archives in it. The manual
    directory is {reader.LAYOUT}. The config `text` needs the CSV files alone and downloads them.
    """
    DESCRIPTION = "Dialogues of a television series with an emotion for each utterance."
    CITATION = """
    @inproceedings{poria2019meld,
      title={{MELD}: A Multimodal Multi-Party Dataset for Emotion Recognition in Conversations},
      author={Poria, Soujanya and Hazarika, Devamanyu and Majumder, Navonil and Naik, Gautam and
              Cambria, Erik and Mihalcea, Rada},
      booktitle={Proceedings of ACL},
      year={2019}
    }
    """
    LICENSE = "GPL-3.0 (annotation); the scenes belong to their producers."
    HOMEPAGE = "https://affective-meld.github.io"

    def class_names(self) -> tuple[str, ...]:
        return reader.CLASS_NAMES

    def read(self, source: pathlib.Path, *, partial: bool = False) -> Corpus:
        config = self.builder_config
        return reader.read(
            source,
            clips=config.clips,
            corrected_test_clips=config.corrected_test_clips,
            partial=partial,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        if self.corpus is None and not self.builder_config.clips:
            self.corpus = self.read(download(dl_manager))
        return super()._split_generators(dl_manager)


def download(dl_manager: tfds.download.DownloadManager) -> pathlib.Path:
    """Fetches the CSV files into one folder and returns it."""
    names = reader.CSV_FILES.values()
    paths = dl_manager.download({name: f"{_URL}/{name}" for name in names})
    folder = pathlib.Path(dl_manager.download_dir) / "meld_csv"
    folder.mkdir(exist_ok=True)
    for name, path in paths.items():
        (folder / name).write_bytes(path.read_bytes())
    return folder
