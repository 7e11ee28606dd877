"""Stratified splits that never divide a group of near-duplicates."""
from collections.abc import Sequence

import numpy as np

from models.data.faceset import SPLITS


def split_groups(labels: Sequence[int], groups: list[list[int]], ratios: Sequence[float],
                 seed: int) -> list[str]:
    """The split of each picture, '' for the pictures of groups whose labels disagree.

    groups: positions of the pictures. Each class is split exactly, to rounding. Large groups are
    assigned first, each to a split with a probability proportional to the room left in it.
    """
    rng = np.random.default_rng(seed)
    splits = [""] * len(labels)
    groups_of_label: dict[int, list[list[int]]] = {}
    for group in groups:
        group_labels = {labels[i] for i in group}
        if len(group_labels) == 1:
            groups_of_label.setdefault(group_labels.pop(), []).append(group)
    for label in sorted(groups_of_label):
        class_groups = groups_of_label[label]
        room = np.array(split_sizes(sum(map(len, class_groups)), ratios))
        order = rng.permutation(len(class_groups)).tolist()
        for k in sorted(order, key=lambda k: -len(class_groups[k])):
            split = draw_split(room, len(class_groups[k]), rng)
            room[split] -= len(class_groups[k])
            for i in class_groups[k]:
                splits[i] = SPLITS[split]
    return splits


def draw_split(room: np.ndarray, size: int, rng: np.random.Generator) -> int:
    """A split that has room for a group of this size; where none has, the one with most room."""
    fitting_room = np.where(room >= size, room, 0)
    if not fitting_room.any():
        return int(room.argmax())
    return int(rng.choice(len(room), p=fitting_room / fitting_room.sum()))


def split_sizes(n: int, ratios: Sequence[float]) -> list[int]:
    """Integers that sum to n, each within one of n * ratio; the largest remainders round up."""
    shares = [n * ratio for ratio in ratios]
    sizes = [int(share + 1e-9) for share in shares]
    for i in sorted(range(len(ratios)), key=lambda i: sizes[i] - shares[i])[:n - sum(sizes)]:
        sizes[i] += 1
    return sizes
