"""Types shared by the readers of feature files: fields, their roles, and columns."""

import abc
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import numpy as np

from mister_jax.data.schema import MODALITIES, SPLITS
from mister_jax.errors import InputError

ROLES = ("text", "speech", "label", "score", "speaker", "sentence", "utterance", *SPLITS)
"""Possible roles of a field. The flag `--fields` assigns roles."""

_MAX_LISTED = 20  # maximum number of fields that an error lists

Roles = Mapping[str, tuple[str, ...]]
"""Maps each role to the keys of its fields. If a role has several fields, they are averaged."""


@dataclasses.dataclass(frozen=True)
class Field:
    """Field of a feature file.

    Attributes:
        key: Index in a tuple, or key in a dict.
        kind: Kind of the values, such as "features".
        count: Number of values and their unit as text, such as "16 dialogues".
        dims: Feature dimension as text; empty if the field does not contain feature vectors.
        example: First value.
        note: Content of a field without a default role, such as "visual features"; empty if the
            field has a default role or if its content is unknown.
    """

    key: str
    kind: str
    count: str
    dims: str
    example: str
    note: str = ""


@dataclasses.dataclass
class Columns:
    """Utterances of a feature file, with one row per utterance.

    Attributes:
        dialogue: Ids of the dialogues, [N].
        utterance: Ids of the utterances, [N].
        position: Positions in the dialogue, [N].
        label: Class indices [N] int, -1 if unlabeled; or class names [N] str, empty if unlabeled.
        split: Names of the splits [N], or None if the file has no splits.
        features: For each modality in the file, features [N, D] and presence flags [N].
        score: Sentiment scores, [N], or None.
        metadata: Additional columns by name, [N] each.
        notes: Notes for the user.
    """

    dialogue: list[str]
    utterance: list[str]
    position: list[int]
    label: np.ndarray
    split: list[str] | None
    features: dict[str, tuple[np.ndarray, np.ndarray]]
    score: np.ndarray | None = None
    metadata: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


class FeatureSource(abc.ABC):
    """Content of a feature file, with roles for its fields.

    Attributes:
        path: Path of the file.
        layout: Name of the layout.
        fields: Fields in the order of the file.
        defaults: Roles that follow from the layout.
        roles: Roles that fields of this layout can have.
        averages: Whether the user can select several feature fields for a modality, which are then
            averaged.
        class_names: Class names in the order of the labels; empty if the file has no class names.
    """

    roles: ClassVar[Sequence[str]] = ROLES
    averages: ClassVar[bool] = False

    def __init__(
        self,
        path: pathlib.Path,
        layout: str,
        fields: Sequence[Field],
        defaults: Roles,
        class_names: Sequence[str] = (),
    ) -> None:
        self.path = path
        self.layout = layout
        self.fields = tuple(fields)
        self.defaults = defaults
        self.class_names = tuple(class_names)

    def assign(self, choices: Mapping[str, str]) -> Roles:
        """Returns the default roles of the layout, changed by the user's choices.

        Args:
            choices: Key of a field by role, or several keys joined by `+`. An empty value removes
                the role.

        Raises:
            InputError: A role or key does not exist.
        """
        roles = dict(self.defaults)
        keys = [field.key for field in self.fields]
        for role, choice in choices.items():
            flag = f"--fields={role}={choice}"
            if role not in self.roles:
                self.fail(f"{flag}; allowed: {', '.join(self.roles)}")
            # A key may itself contain a plus sign.
            chosen = (choice,) if choice in keys else tuple(choice.split("+"))
            if not choice:
                roles.pop(role, None)
                continue
            for key in chosen:
                if key not in keys:
                    self.fail(f"{flag}: no field {key!r}; allowed: {self.describe_fields()}")
            if len(chosen) > 1 and not (self.averages and role in MODALITIES):
                self.fail(f"{flag}; allowed: one field")
            roles[role] = chosen
        return roles

    @abc.abstractmethod
    def columns(self, roles: Roles) -> Columns:
        """Returns the utterances.

        Raises:
            InputError: The fields have unequal lengths or unsuitable values, or a role is missing.
        """

    def describe_fields(self) -> str:
        """Lists the fields on one line."""
        fields = [
            f"{shorten(field.key)} ({' '.join(filter(None, (field.kind, field.dims)))})"
            for field in self.fields
        ]
        more = f", and {len(fields) - _MAX_LISTED} more" if len(fields) > _MAX_LISTED else ""
        return ", ".join(fields[:_MAX_LISTED]) + more

    def fail(self, message: str) -> NoReturn:
        """Raises a one-line InputError about the file."""
        raise InputError(f"{self.path}: {' '.join(message.split())}")

    def field_note(self, key: str, roles: Roles) -> str:
        """Returns what a field is used for."""
        uses = [role for role, keys in roles.items() if key in keys]
        note = next(field.note for field in self.fields if field.key == key)
        return ", ".join(uses) or (f"not used: {note}" if note else "not used")


def shorten(value: Any, width: int = 40) -> str:
    """Returns a value as text on one line of at most `width` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= width else f"{text[: width - 3]}..."
