"""Registry of the released corpora.

To add a corpus, write a module in this folder that defines a subclass of `DialogueBuilder`, and add
an entry to `CORPORA`.
"""

import importlib
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


def builder_class(name: str) -> "type[DialogueBuilder]":
    """Returns the builder of a corpus.

    Raises:
        InputError: The corpus is unknown.
    """
    if name not in CORPORA:
        raise InputError(f"corpus {name!r}; allowed: {', '.join(CORPORA)}")
    module, _, class_name = CORPORA[name].rpartition(".")
    return getattr(importlib.import_module(module), class_name)
