"""Random splits of dialogues that keep groups, such as speakers, apart."""

import collections
from collections.abc import Mapping, Sequence, Set

import numpy as np

from mister_jax.data.schema import SPLITS
from mister_jax.errors import InputError

SHARES = (0.8, 0.1, 0.1)
"""Default shares of the dialogues in training, validation and test."""


def random_splits(
    dialogues: Mapping[str, int],
    groups: Mapping[str, Set[str]],
    *,
    name: str,
    source: str,
    explicit: bool = False,
    seed: int = 0,
    shares: Sequence[float] = SHARES,
) -> tuple[dict[str, str], str]:
    """Shares dialogues out among the splits at random.

    Dialogues that have a group in common get the same split. Groups often connect all dialogues of
    a conversational corpus, where everybody talks to everybody. If fewer parts than splits are
    left, the dialogues are shared out one by one, and the note says so.

    Args:
        dialogues: Number of utterances by dialogue.
        groups: Groups by dialogue, for example its speakers; may lack dialogues.
        name: What a group is, for messages.
        source: Where the dialogues come from, for messages.
        explicit: Raise an error if the groups leave too few parts.
        seed: Seed of the draw.
        shares: Shares of the dialogues in training, validation and test. Each split with a share
            gets at least one part if there are enough.

    Returns:
        A split for each dialogue, and a note for the user that says how it was chosen.

    Raises:
        InputError: Shares that cannot be used, or groups that leave too few parts and are
            `explicit`.
    """
    if len(shares) != len(SPLITS) or min(shares) < 0 or sum(shares) <= 0:
        raise InputError(f"split shares {tuple(shares)}; allowed: three, at least 0, not all 0")
    units = _connected(list(dialogues), groups)
    note = f"dialogues split at random, seed {seed}"
    num_needed = sum(share > 0 for share in shares)
    if sum(bool(groups.get(dialogue)) for dialogue in dialogues) <= len(dialogues) / 2:
        if sum(count == 1 for count in dialogues.values()) > len(dialogues) / 2:
            note = (
                f"WARNING: {note}; most dialogues hold one utterance and nothing says which of "
                f"them share a speaker. The same speakers in training and test make scores look "
                f"far too good: add a column speaker, or splits of your own"
            )
    elif len(units) >= num_needed:
        note += f", in {len(units)} groups that share no {name}"
    else:
        problem = f"dialogues that share a {name} form {len(units)} groups"
        if explicit:
            raise InputError(
                f"{source}: {problem}; needed for a random split: at least {num_needed}"
            )
        note = (
            f"WARNING: {note}, one by one: {problem}, too few to keep apart, so the splits may "
            f"have values of {name} in common"
        )
        units = [[dialogue] for dialogue in dialogues]
    return _draw(units, seed, np.asarray(shares, float)), note


def overlap_note(groups: Mapping[str, Set[str]], splits: Mapping[str, str], name: str) -> str:
    """Returns a warning if groups are in training and in another split, else an empty text.

    Args:
        groups: Groups by dialogue.
        splits: The split of each dialogue.
        name: What a group is.
    """
    seen: dict[str, set[str]] = collections.defaultdict(set)
    for dialogue, members in groups.items():
        for member in members:
            seen[member].add(splits[dialogue])
    num_shared = sum("train" in places and len(places) > 1 for places in seen.values())
    if not num_shared:
        return ""
    return (
        f"WARNING: {num_shared} of {len(seen)} values of {name} are in training and in another "
        "split"
    )


def _connected(dialogues: Sequence[str], groups: Mapping[str, Set[str]]) -> list[list[str]]:
    """Returns the dialogues in parts; dialogues that share a group are in the same one."""
    parent = {dialogue: dialogue for dialogue in dialogues}

    def root(dialogue: str) -> str:
        while parent[dialogue] != dialogue:
            parent[dialogue] = parent[parent[dialogue]]
            dialogue = parent[dialogue]
        return dialogue

    first_with: dict[str, str] = {}
    for dialogue in dialogues:
        for group in groups.get(dialogue, ()):
            parent[root(dialogue)] = root(first_with.setdefault(group, dialogue))
    units: dict[str, list[str]] = collections.defaultdict(list)
    for dialogue in dialogues:
        units[root(dialogue)].append(dialogue)
    return list(units.values())


def _draw(units: Sequence[Sequence[str]], seed: int, shares: np.ndarray) -> dict[str, str]:
    """Gives each unit to the split that lacks most, large units first."""
    sizes = np.array([len(unit) for unit in units])
    shuffled = np.random.default_rng(seed).permutation(len(units))
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    lacking = shares / shares.sum() * sizes.sum()
    empty = shares > 0
    splits: dict[str, str] = {}
    for place, index in enumerate(order):
        # The last units go to the splits that have none yet.
        candidates = empty if len(order) - place <= empty.sum() else shares > 0
        chosen = int(np.argmax(np.where(candidates, lacking, -np.inf)))
        lacking[chosen] -= sizes[index]
        empty[chosen] = False
        splits |= dict.fromkeys(units[index], SPLITS[chosen])
    return splits
