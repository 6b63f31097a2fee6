"""MELD as a TFDS dataset."""

import dataclasses
import pathlib
import threading
import urllib.request
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from etils import epath

from mister_jax.data.builder import DialogueBuilder
from mister_jax.data.corpus import Corpus
from mister_jax.data.meld import reader
from mister_jax.data.storage import whole_directory
from mister_jax.errors import InputError

# There are no published checksums of these files, and the branch may move. Instead the reader
# refuses other numbers of dialogues and utterances than the published ones.
_URL = "https://raw.githubusercontent.com/declare-lab/MELD/master/data/MELD"

_PATIENCE = 10.0
"""Seconds to wait for an answer of the server."""

_UNFINISHED = "*/*.tmp.*"
"""Pattern of the folders in which TFDS keeps unfinished downloads."""


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
    """Downloads the CSV files into one folder, unless they are there already, and returns it.

    Raises:
        InputError: The files cannot be downloaded or written.
    """
    names = reader.CSV_FILES.values()
    folder = epath.Path(dl_manager.download_dir)
    csv_folder = folder / "meld_csv"
    if csv_folder.exists():
        return pathlib.Path(csv_folder)
    before = set(folder.glob(_UNFINISHED))
    try:
        # Without a network TFDS retries for minutes.
        _ask(f"{_URL}/{next(iter(names))}")
        paths = dl_manager.download({name: f"{_URL}/{name}" for name in names})
    # requests, TFDS and TensorFlow raise errors of different types.
    except Exception as error:
        for left in set(folder.glob(_UNFINISHED)) - before:
            left.rmtree()
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"MELD's CSV files cannot be downloaded ({reason}); --source=DIR reads "
            f"{', '.join(names)} from a folder"
        ) from error
    with whole_directory(csv_folder, folder, overwrite=True) as place:
        (place / csv_folder.name).mkdir()
        for name, path in paths.items():
            path.copy(place / csv_folder.name / name)
    return pathlib.Path(csv_folder)


def _ask(url: str) -> None:
    """Raises an error unless the server confirms soon that a file exists."""
    answers: list[Exception | None] = []

    def wait() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=_PATIENCE).close()
            answers.append(None)
        except Exception as error:
            answers.append(error)

    # The time of a DNS lookup can only be limited from outside.
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    if not answers:
        raise TimeoutError(f"no answer in {_PATIENCE:g} s")
    if answers[0] is not None:
        raise answers[0]
