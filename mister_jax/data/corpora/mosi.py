"""Reads CMU-MOSI: video monologues about films, with sentiment scores (arXiv 1606.06259).

The release contains recordings and transcripts of segments. The CMU Multimodal SDK contains the
sentiment scores. As in the paper, the two classes are scores in [-3, 0) and scores in [0, 3]. The
score is also stored, and `metrics.binary_sentiment` computes other binary labels from the score.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import ClassVar

from mister_jax.data.builder import CorpusConfig, DialogueBuilder
from mister_jax.data.corpora.cmu_sdk import read_sequence
from mister_jax.data.corpus import (
    Corpus,
    DecodeRequest,
    Dialogue,
    Utterance,
    check_sizes,
    existing_directory,
    find,
    read_text,
)
from mister_jax.data.schema import SPLITS
from mister_jax.errors import InputError

CLASS_NAMES = ("negative", "non_negative")

RELEASED = {"train": (52, 1284), "validation": (10, 229), "test": (31, 686)}
"""Number of videos and segments in each split."""

AUDIO, TRANSCRIPTS = "Raw/Audio/WAV_16000/Segmented", "Raw/Transcript/Segmented"
LABELS = "CMU_MOSI_Opinion_Labels.csd"
LAYOUT = f"a folder that contains {AUDIO}, {TRANSCRIPTS} and {LABELS}"

_TRAIN = """
    03bSnISJMiM 0h-zjBukYpk 1DmNV9C1hbY 1iG0909rllw 2WGyTLYerpo 2iD-tVS8NPw 5W7Z1C_fDaE 6Egk_28TtTM
    6_0THN4chvY 73jzhE8R1TQ 7JsX8y1ysxY 8OtFthrtaJM 8d-gEyoeBzc 8qrpnFRGt2A 9J25DZhivz8 9T9Hf74oK10
    9c67fiY0wGQ 9qR7uwkblbs Af8D0E4ZXaw BI97DNYfe5I BXuRRbG0Ugk Bfr499ggo-0 BioHAh1qJAQ BvYR0L6f2Ig
    Ci-AH39fi3Y Clx4VXItLTE Dg_0XKD0Mf4 G-xst2euQUc G6GlGvlkxAQ GWuJjcEuzt8 HEsqda8_d0Q I5y0__X72p0
    Iu2PFX3z_1s IumbAb8q2dM Jkswaaud0hk LSi-o-IrDMs MLal-t_vJPM Njd1F0vZSm4 Nzq88NnDkEk OQvJTdtJ2H4
    OtBXNcAL_lE Oz06ZWiO20M POKffnXeBds PZ-lDQFboO8 QN9ZIUWUXsY Qr1Ca94K55A Sqr0AcuoNnk TvyZBvOMOTc
    VCslbP0mgZI VbQk4H8hgr0 Vj1wYRQjB-o W8NXH0Djyww
"""
_VALIDATION = """
    WKA5OygbEKI X3j2zQgwYgE ZAIRrfG22O0 ZUXBRvtny7o _dI--eQ6qVU aiEXnCPZubE atnd_PF-Lbs bOL9jKpeJRs
    bvLlb-M3UXU c5xsKMxpXnc
"""
_TEST = """
    c7UH_rxdZv4 cM3Yna7AavY cW1FSBF59ik cXypl4FnoZo d3_k5Xpfmik d6hH302o4v8 dq3Nf_lMPnE etzxEpPuc6I
    f9O3YtZ2VfI f_pcplsH_V0 fvVhgmXxadc iiK8YX8oH1E jUzDDGyPkXU k5Y_838nuGo lXPQBPVc5Cw nbWiPyCm4g0
    nzpVDcQ0ywM ob23OKe5a9Q pLTX3ipuDJI phBUpBr1hSo rnaNMUZpvvg tIrG4oNLFzE tStelxIAHjw tmZoasNr4rU
    v0zCBqDeKcE vvZ4IcEtiZc vyB00TXsimI wMbj6ajWbic yDtzw_Y-7RU yvsjCA6Y5Fc zhpQhgha_KU
"""
VIDEOS: Mapping[str, str] = {
    video: split
    for split, videos in (("train", _TRAIN), ("validation", _VALIDATION), ("test", _TEST))
    for video in videos.split()
}
"""Maps each video to its split in the SDK."""

_SEGMENT = re.compile(r"(\d+)_DELIM_(.*)")


def read_mosi(source: str | pathlib.Path, *, partial: bool = False) -> Corpus:
    """Reads the labels and transcripts of CMU-MOSI and locates its recordings.

    Args:
        source: Folder that contains `Raw` and the labels.
        partial: Whether to allow a corpus whose size differs from the release.

    Raises:
        InputError: A file is missing or cannot be used.
    """
    root = existing_directory(source, needed=LAYOUT)
    labels = find(root, LABELS)
    transcripts = root / TRANSCRIPTS
    if labels is None or not transcripts.is_dir():
        missing = LABELS if labels is None else TRANSCRIPTS
        raise InputError(f"{root}: no {missing}; needed: {LAYOUT}")
    splits: dict[str, list[Dialogue]] = {split: [] for split in SPLITS}
    for video, (features, intervals) in sorted(read_sequence(labels, 1).items()):
        scores = features[:, 0]
        if video not in VIDEOS:
            raise InputError(f"{labels}: video {video!r} is in no split of the corpus")
        path = transcripts / f"{video}.annotprocessed"
        texts = _transcript(path)
        if sorted(texts) != list(range(1, len(scores) + 1)):
            raise InputError(
                f"{path}: segments {sorted(texts)}; needed: 1 to {len(scores)}, as in {labels.name}"
            )
        utterances = []
        for number, (score, (start, end)) in enumerate(zip(scores, intervals, strict=True), 1):
            if not -3 <= score <= 3:
                raise InputError(
                    f"{labels}: {video}: segment {number}: score {score}; allowed: -3 to 3"
                )
            segment = f"{video}_{number}"
            utterances.append(
                Utterance(
                    id=segment,
                    text=texts[number],
                    recording=DecodeRequest(str(root / AUDIO / f"{segment}.wav")),
                    label=CLASS_NAMES[int(score >= 0)],
                    score=float(score),
                    start=float(start),
                    end=float(end),
                )
            )
        splits[VIDEOS[video]].append(Dialogue(video, tuple(utterances)))
    corpus = Corpus("mosi", CLASS_NAMES, splits, scored=True)
    return check_sizes(corpus, RELEASED, partial=partial)


def _transcript(path: pathlib.Path) -> dict[int, str]:
    texts: dict[int, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        match = _SEGMENT.fullmatch(line.strip())
        if match is None:
            raise InputError(f"{path}: line {number}: {line[:60]!r}; needed: number_DELIM_text")
        segment = int(match[1])
        if segment in texts:
            raise InputError(f"{path}: line {number}: segment {segment} is repeated")
        texts[segment] = match[2].strip()
    return texts


class Mosi(DialogueBuilder):
    """TFDS builder for CMU-MOSI."""

    read = staticmethod(read_mosi)
    BUILDER_CONFIGS: ClassVar = [
        CorpusConfig(name="binary", description="Scores in [-3, 0) and in [0, 3] as classes.")
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"""
    Get the raw data and the labels with the CMU Multimodal SDK
    (https://github.com/CMU-MultiComp-Lab/CMU-MultimodalSDK). The manual directory is
    {LAYOUT}.
    """
    DESCRIPTION = "Monologues about films, with a sentiment score for each segment."
    CITATION = """
    @article{zadeh2016mosi,
      title={{MOSI}: multimodal corpus of sentiment intensity and subjectivity analysis in online
             opinion videos},
      author={Zadeh, Amir and Zellers, Rowan and Pincus, Eli and Morency, Louis-Philippe},
      journal={arXiv:1606.06259},
      year={2016}
    }
    """
    LICENSE = "For research; the videos belong to their authors."
    HOMEPAGE = "http://multicomp.cs.cmu.edu/resources/cmu-mosi-dataset"
