"""Votes of each person's photos over the classes, and the rule that turns them into one label.

At most `max_images` random photos of a person vote. A person's sample depends on the seed, the
person and the file names only, so neither other people nor the order of a table change it.
"""
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from models.reports.name_hashes import hash_names
from models.reports.prediction_blocks import ABSTAINED, PhotoBlock

# Bits of the 64 into which a photo's vote is packed: person number, random key, prediction.
PERSON_BITS, KEY_BITS, PREDICTION_BITS = 28, 30, 6

# Why a person is dropped: positions in REASONS.
KEPT, NO_PHOTO, NO_FACES, TOO_FEW_FACES, TIE, BELOW_THRESHOLD = range(6)
REASONS = ("", "no picture", "no face in any picture", "too few pictures with a face",
           "two classes lead together", "the share is below the threshold")


# -------------------------------------------------------------------- the random sample of photos
def number_people(block: PhotoBlock, numbers: dict[bytes, int]) -> np.ndarray:
    """The number (n,) int64 of each photo's person, -1 for a photo outside any folder.

    numbers maps a person's folder to a number; new people are added. Consecutive photos of one
    person, the order in which infer.py writes them, cost a single look-up.
    """
    folder_ends = block.folder_ends()
    hashes = hash_names(block.text, block.starts, folder_ends, 0)
    is_first = np.ones(len(hashes), bool)
    is_first[1:] = hashes[1:] != hashes[:-1]
    text, firsts = block.text.tobytes(), np.flatnonzero(is_first)
    spans = zip(block.starts[firsts].tolist(), folder_ends[firsts].tolist(),
                block.ends[firsts].tolist(), strict=True)
    people = [numbers.setdefault(text[start:folder_end], len(numbers))
              if start < folder_end < end else -1 for start, folder_end, end in spans]
    return np.repeat(np.array(people, np.int64), np.diff(np.append(firsts, len(hashes))))


def pack_votes(block: PhotoBlock, people: np.ndarray, seed: int) -> np.ndarray:
    """Each photo's person number, random key and prediction in one number, (n,) uint64.

    The key is a hash of the seed and the file name, and the photos with a person's smallest keys
    are the sample: sorting the numbers draws the samples of all people.
    """
    keys = hash_names(block.text, block.starts, block.ends, seed + 1) >> np.uint64(64 - KEY_BITS)
    return ((people.astype(np.uint64) << np.uint64(KEY_BITS + PREDICTION_BITS))
            | (keys << np.uint64(PREDICTION_BITS)) | block.predictions.astype(np.uint64))


def sample_positions(blocks: Iterator[PhotoBlock], max_images: int, seed: int) -> np.ndarray:
    """Ascending positions (n,) int64 of at most max_images random photos of each person."""
    numbers: dict[bytes, int] = {}
    people_parts, vote_parts = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for block in blocks:
        people_parts.append(number_people(block, numbers))
        vote_parts.append(pack_votes(block, people_parts[-1], seed))
    people = np.concatenate(people_parts)
    order = np.concatenate(vote_parts).argsort(kind="stable")
    order = order[people[order] >= 0]
    return np.sort(order[index_in_group(people[order]) < max_images])


def index_in_group(groups: np.ndarray) -> np.ndarray:
    """Index (n,) int64 of each entry within its group. groups (n,): equal values are adjacent."""
    firsts = np.flatnonzero(np.diff(groups, prepend=-1))
    index = np.arange(len(groups))
    # In place, because these are the largest arrays.
    index -= np.repeat(firsts, np.diff(np.append(firsts, len(groups))))
    return index


# ------------------------------------------------------------------------------ counting the votes
@dataclass
class VoteTable:
    """Vote counts of P people over C classes."""
    classes: list[bytes]
    person_ids: list[bytes]         # sorted
    person_index: dict[bytes, int]  # position in person_ids
    n_images: np.ndarray            # (P,) int64 photos
    n_sampled: np.ndarray           # (P,) int64 photos in the sample
    n_faces: np.ndarray             # (P,) int64 of n_sampled, with a face; it may be ABSTAINED
    counts: np.ndarray              # (P, C) int64 votes
    n_outside: int                  # photos outside any person's folder


def count_votes(read_blocks: Callable[[], Iterator[PhotoBlock]], classes: list[bytes],
                max_images: int, seed: int, further_people: Iterable[bytes] = ()) -> VoteTable:
    """The votes of every person's sample. A photo takes 8 bytes of memory, a person about 300.

    further_people: people to list even without a photo. Raises ValueError for too many people.
    """
    numbers, votes, n_outside = read_votes(read_blocks(), seed)
    for person in further_people:
        numbers.setdefault(person, len(numbers))
    votes.sort()
    people = (votes >> np.uint64(KEY_BITS + PREDICTION_BITS)).astype(np.int32)
    n_people = len(numbers)
    n_images = np.bincount(people, minlength=n_people)
    is_sampled = index_in_group(people) < max_images
    predictions = (votes[is_sampled] & np.uint64((1 << PREDICTION_BITS) - 1)).astype(np.int64)
    del votes
    people = people[is_sampled]
    counts = np.stack([np.bincount(people[predictions == c], minlength=n_people)
                       for c in range(len(classes))], 1)
    n_sampled = np.bincount(people, minlength=n_people)
    n_faces = np.bincount(people[predictions <= ABSTAINED], minlength=n_people)
    person_ids = sorted(numbers)
    order = np.array([numbers[person] for person in person_ids], np.int64)
    return VoteTable(classes, person_ids, {person: i for i, person in enumerate(person_ids)},
                     n_images=n_images[order], n_sampled=n_sampled[order], n_faces=n_faces[order],
                     counts=counts[order], n_outside=n_outside)


def read_votes(blocks: Iterator[PhotoBlock],
               seed: int) -> tuple[dict[bytes, int], np.ndarray, int]:
    """The people's numbers, the packed votes (n,) uint64, the count of photos outside folders."""
    numbers: dict[bytes, int] = {}
    parts, n_outside = [np.zeros(0, np.uint64)], 0
    for block in blocks:
        people = number_people(block, numbers)
        has_person = people >= 0
        n_outside += int((~has_person).sum())
        parts.append(pack_votes(block, people, seed)[has_person])
        if len(numbers) >> PERSON_BITS:
            raise ValueError(f"it has more than {1 << PERSON_BITS:,} people")
    return numbers, np.concatenate(parts), n_outside


# -------------------------------------------------------------------------------- the decision rule
@dataclass(frozen=True)
class ConsensusRule:
    """When a person's photos agree, and which photos vote."""
    threshold: float = 0.8          # least share of the most voted class among the faces
    strict: bool = False            # the share must exceed the threshold
    max_images: int = 20            # photos of a person that vote, at most
    min_images: int = 3             # of those with a face, at least
    seed: int = 0                   # of the random sample


@dataclass
class Decisions:
    """The label of each of P people, and why a person has none."""
    leading: np.ndarray             # (P,) int64 most voted class, -1 for a tie or without votes
    share: np.ndarray               # (P,) float64 of the most voted class; 0 without a face
    labels: np.ndarray              # (P,) int64 class, -1 for a person who is dropped
    reasons: np.ndarray             # (P,) int64 position in REASONS

    @property
    def is_kept(self) -> np.ndarray:
        """(P,) bool."""
        return self.labels >= 0


def apply_rule(votes: VoteTable, rule: ConsensusRule) -> Decisions:
    """The most voted class of each person whose share of the faces reaches the threshold."""
    most_votes = votes.counts.max(1)
    n_leading = (votes.counts == most_votes[:, None]).sum(1)
    leading = np.where((n_leading == 1) & (most_votes > 0), votes.counts.argmax(1), -1)
    share = most_votes / np.maximum(votes.n_faces, 1)
    is_agreed = share > rule.threshold if rule.strict else share >= rule.threshold
    reasons = np.select(
        [votes.n_sampled == 0, votes.n_faces == 0, votes.n_faces < rule.min_images, ~is_agreed,
         leading < 0],
        [NO_PHOTO, NO_FACES, TOO_FEW_FACES, BELOW_THRESHOLD, TIE], KEPT)
    return Decisions(leading, share, np.where(reasons == KEPT, leading, -1), reasons)
