"""Names the classes of published feature files, which contain class numbers but no names.

The order of the classes differs between projects, in particular for MELD. In the test split of each
corpus, no two classes have the same number of utterances, so these numbers identify the classes.
"""

import re
from collections.abc import Mapping, Sequence

_IEMOCAP = {
    "happy": 144,
    "sad": 245,
    "neutral": 384,
    "angry": 170,
    "excited": 299,
    "frustrated": 381,
}
_IEMOCAP_FOUR = {name: _IEMOCAP[name] for name in ("happy", "sad", "neutral", "angry")}

TEST_COUNTS: Mapping[str, Sequence[Mapping[str, int]]] = {
    # The second and third versions have four classes: the second omits "excited", and the third
    # merges "excited" into "happy".
    "IEMOCAP": (_IEMOCAP, _IEMOCAP_FOUR, _IEMOCAP_FOUR | {"happy": 443}),
    "MELD": (
        {
            "neutral": 1256,
            "joy": 402,
            "anger": 345,
            "surprise": 281,
            "sadness": 208,
            "disgust": 68,
            "fear": 50,
        },
        {"neutral": 1256, "negative": 833, "positive": 521},
    ),
    "EmoryNLP": (
        {
            "joyful": 217,
            "mad": 86,
            "peaceful": 111,
            "neutral": 288,
            "sad": 70,
            "powerful": 96,
            "scared": 116,
        },
    ),
}
"""Number of test utterances per class, for each version of each corpus."""

_IEMOCAP_DIALOGUE = re.compile(r"Ses0[1-5][FM]_(impro|script)\w+")


def published_classes(
    test_counts: Mapping[int, int], dialogues: Sequence[str], num_classes: int
) -> tuple[tuple[str, ...], str]:
    """Returns the class names by index, and a note on how the classes were recognized.

    If the classes are not recognized, the result is `((), "")`.

    Args:
        test_counts: Number of test utterances of each class.
        dialogues: Ids of all dialogues.
        num_classes: Number of classes.
    """
    for corpus, versions in TEST_COUNTS.items():
        for version in versions:
            names = {count: name for name, count in version.items()}
            if sorted(names) == sorted(test_counts.values()) and num_classes == len(names):
                classes = tuple(names[test_counts[index]] for index in range(num_classes))
                note = f"classes of {corpus}, recognized by their numbers of test utterances"
                return classes, f"{note}: {', '.join(classes)}"
    if num_classes == len(_IEMOCAP) and all(map(_IEMOCAP_DIALOGUE.fullmatch, dialogues)):
        note = "classes of IEMOCAP in the usual order of feature files; --labels sets another order"
        return tuple(_IEMOCAP), f"{note}: {', '.join(_IEMOCAP)}"
    return (), ""
