"""Registry of the released corpora.

To add a corpus, write a module in this folder that defines a subclass of `DialogueBuilder`, and add
an entry to `CORPORA`. The key must be the name of the class in snake case, such as `radio_play` for
`RadioPlay`, because TFDS names the dataset after the class.

Other sources of dialogues, such as `manifest`, `folder` and `emobox`, are in `data.prepare`.
"""

import importlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mister_jax.errors import InputError

if TYPE_CHECKING:
    from mister_jax.data.builder import DialogueBuilder

CORPORA: Mapping[str, str] = {
    "iemocap": "mister_jax.data.corpora.iemocap.Iemocap",
    "meld": "mister_jax.data.corpora.meld.Meld",
    "mosi": "mister_jax.data.corpora.mosi.Mosi",
    "mosei": "mister_jax.data.corpora.mosei.Mosei",
    "emorynlp": "mister_jax.data.corpora.emorynlp.Emorynlp",
}
"""Import path of each corpus's builder, which is imported on first use because it needs TFDS."""

_ATTRIBUTES = ("read", "BUILDER_CONFIGS", "DESCRIPTION", "LICENSE")  # Every builder defines these.


def builder_class(name: str) -> "type[DialogueBuilder]":
    """Returns the builder of a corpus.

    Raises:
        InputError: The corpus is unknown, its builder does not exist or lacks an attribute, or the
            builder's name does not match the corpus.
    """
    if name not in CORPORA:
        raise InputError(f"corpus {name!r}; allowed: {', '.join(CORPORA)}")
    from mister_jax.data.builder import DialogueBuilder

    path = CORPORA[name]
    module, _, class_name = path.rpartition(".")
    builder = getattr(importlib.import_module(module), class_name, None)
    if not (isinstance(builder, type) and issubclass(builder, DialogueBuilder)):
        raise InputError(f"corpus {name!r}: {path}: no such subclass of DialogueBuilder")
    for attribute in _ATTRIBUTES:
        if not getattr(builder, attribute, None):
            raise InputError(
                f"corpus {name!r}: {path}: no {attribute}; needed: {', '.join(_ATTRIBUTES)}"
            )
    if builder.name != name:
        camel_case = re.sub("(?:^|_)([a-z])", lambda match: match[1].upper(), name)
        raise InputError(
            f"corpus {name!r}: {path}: TFDS names this class {builder.name!r}; needed: the class "
            f"name {camel_case}, or the key {builder.name!r} in CORPORA"
        )
    return builder
