"""Splits dialogues at random, if possible so that no group, such as a speaker, is in two splits."""

import collections
from collections.abc import Hashable, Mapping, Sequence, Set

import numpy as np

from mister_jax.data.schema import SPLITS
from mister_jax.errors import InputError

DEFAULT_FRACTIONS = (0.8, 0.1, 0.1)
"""Default fractions of dialogues for training, validation and test."""

# Dialogues are assigned to splits at random up to `_MAX_DRAWS` times, and the assignment is used in
# which the splits' shares of all classes are closest to the fractions. With many components (sets
# of dialogues that stay together), any assignment is close, so `_MAX_ASSIGNMENTS` limits the number
# of assignments times the number of components.
_MAX_DRAWS, _MAX_ASSIGNMENTS = 256, 20_000


def random_splits(
    dialogues: Mapping[str, Sequence[Hashable]],
    groups: Mapping[str, Set[str]],
    *,
    name: str,
    source: str,
    explicit: bool = False,
    seed: int = 0,
    fractions: Sequence[float] = DEFAULT_FRACTIONS,
) -> tuple[dict[str, str], str]:
    """Assigns dialogues to splits at random, so that all splits have similar class frequencies.

    Dialogues that share a group are connected and get the same split. In conversational corpora,
    groups often connect all dialogues. If there are fewer connected components than splits,
    dialogues are assigned one by one, regardless of groups, and the note says so.

    Args:
        dialogues: Labels of each dialogue's utterances. The label of an unlabeled utterance is
            None.
        groups: Groups of each dialogue, for example its speakers; dialogues without groups may be
            omitted.
        name: Kind of group for the note and error messages, for example "speaker".
        source: Where the dialogues come from, for error messages.
        explicit: Whether to raise an error if there are fewer connected components than splits.
        seed: Seed of the random split.
        fractions: Fractions of dialogues for training, validation and test. Each split with a
            positive fraction gets at least one connected component if there are enough components.

    Returns:
        The split of each dialogue, and a note that tells the user how the splits were chosen.

    Raises:
        InputError: The fractions are invalid, or `explicit` is set and there are too few connected
            components.
    """
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or sum(fractions) <= 0:
        raise InputError(
            f"split fractions {tuple(fractions)}; allowed: three, at least 0, not all 0"
        )
    components = _connected_components(list(dialogues), groups)
    note = f"dialogues split at random, seed {seed}"
    num_needed = sum(fraction > 0 for fraction in fractions)
    if sum(bool(groups.get(dialogue)) for dialogue in dialogues) <= len(dialogues) / 2:
        if sum(len(labels) == 1 for labels in dialogues.values()) > len(dialogues) / 2:
            note = (
                f"WARNING: {note}; most dialogues have one utterance, and their speakers are "
                f"unknown. The same speakers in training and test make scores look far too good: "
                f"add a column speaker, or your own splits"
            )
    elif len(components) >= num_needed:
        note += f", in {len(components)} groups that share no {name}"
    else:
        problem = f"dialogues that share a {name} form {len(components)} groups"
        if explicit:
            raise InputError(
                f"{source}: {problem}; needed for a random split: at least {num_needed}"
            )
        note = (
            f"WARNING: {note}, one by one: {problem}, too few to keep apart, so the same {name} "
            f"may be in several splits"
        )
        components = [[dialogue] for dialogue in dialogues]
    return _draw(dialogues, components, seed, np.asarray(fractions, float)), note


def overlap_note(groups: Mapping[str, Set[str]], splits: Mapping[str, str], name: str) -> str:
    """Returns a warning if any group is in training and in another split, else an empty string.

    Args:
        groups: Groups of each dialogue.
        splits: Split of each dialogue.
        name: Kind of group for the message, for example "speaker".
    """
    splits_of_group: dict[str, set[str]] = collections.defaultdict(set)
    for dialogue, members in groups.items():
        for member in members:
            splits_of_group[member].add(splits[dialogue])
    num_shared = sum("train" in names and len(names) > 1 for names in splits_of_group.values())
    if not num_shared:
        return ""
    return (
        f"WARNING: {num_shared} of {len(splits_of_group)} values of {name} are in training and in "
        "another split"
    )


def _connected_components(
    dialogues: Sequence[str], groups: Mapping[str, Set[str]]
) -> list[list[str]]:
    """Returns the connected components: dialogues that share a group are in the same list."""
    parent = {dialogue: dialogue for dialogue in dialogues}

    def root(dialogue: str) -> str:
        while parent[dialogue] != dialogue:
            parent[dialogue] = parent[parent[dialogue]]
            dialogue = parent[dialogue]
        return dialogue

    first_dialogue: dict[str, str] = {}
    for dialogue in dialogues:
        for group in groups.get(dialogue, ()):
            parent[root(dialogue)] = root(first_dialogue.setdefault(group, dialogue))
    components: dict[str, list[str]] = collections.defaultdict(list)
    for dialogue in dialogues:
        components[root(dialogue)].append(dialogue)
    return list(components.values())


def _draw(
    dialogues: Mapping[str, Sequence[Hashable]],
    components: Sequence[Sequence[str]],
    seed: int,
    fractions: np.ndarray,
) -> dict[str, str]:
    """Draws several assignments of the components and returns the most even assignment.

    In the most even assignment, each split's share of every class, and of all dialogues, is closest
    to the split's fraction.
    """
    classes = {label for labels in dialogues.values() for label in labels if label is not None}
    index = {label: number for number, label in enumerate(sorted(classes, key=str))}
    # The last column counts dialogues.
    counts = np.zeros((len(components), len(index) + 1))
    for number, component in enumerate(components):
        counts[number, -1] = len(component)
        for dialogue in component:
            for label in dialogues[dialogue]:
                if label is not None:
                    counts[number, index[label]] += 1
    shares = counts / counts.sum(0)
    fractions = fractions / fractions.sum()
    rng = np.random.default_rng(seed)
    best_distance, best = np.inf, np.zeros(len(components), int)
    for _ in range(max(1, min(_MAX_DRAWS, _MAX_ASSIGNMENTS // len(components)))):
        assigned = _assign(shares, rng.permutation(len(components)), fractions)
        split_shares = np.stack([shares[assigned == split].sum(0) for split in range(len(SPLITS))])
        distance = np.abs(split_shares - fractions[:, None]).sum()
        if distance < best_distance:
            best_distance, best = distance, assigned
    return {
        dialogue: SPLITS[split]
        for split, component in zip(best, components, strict=True)
        for dialogue in component
    }


def _assign(shares: np.ndarray, shuffled: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Assigns components, largest first, to the splits that most lack the components' classes.

    Args:
        shares: Each component's share of each class and, in the last column, of all dialogues,
            [K, C + 1].
        shuffled: Random order of the components, [K] int.
        fractions: Fractions of the splits, which sum to 1.

    Returns:
        Index of each component's split, [K] int.
    """
    order = shuffled[np.argsort(-shares.sum(1)[shuffled], kind="stable")]
    is_used = fractions > 0
    is_empty = is_used.copy()
    missing = np.repeat(fractions[:, None], shares.shape[1], axis=1)
    # The gain below is divided by the split's fraction. Otherwise, the class frequencies of small
    # splits would match those of the dataset less closely than those of large splits do.
    scale = np.maximum(fractions, 1e-12)[:, None]
    assigned = np.zeros(len(shares), int)
    for position, index in enumerate(order):
        # The last components go to the splits that are still empty.
        candidates = is_empty if len(order) - position <= is_empty.sum() else is_used
        # Decrease of the squared distances between the splits' shares and the fractions.
        gain = (shares[index] * (2 * missing - shares[index]) / scale).sum(1)
        chosen = int(np.argmax(np.where(candidates, gain, -np.inf)))
        missing[chosen] -= shares[index]
        is_empty[chosen] = False
        assigned[index] = chosen
    return assigned
