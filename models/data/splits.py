"""Which pictures of a labelled set are for training, and which for validation."""
from pathlib import Path

import torch

from models.data.duplicates import group_duplicate_files
from models.data.faceset import FaceSet, FaceSetError, read_faceset
from models.running.ranks import broadcast_from_rank0

MIN_PERSON_FOLDERS = 5      # folders per class, from which on a folder is assumed to be one person


def hold_out(faces: FaceSet, share: float, seed: int, num_workers: int = 0,
             rank: int = 0) -> tuple[FaceSet, FaceSet]:
    """Training and validation part of a set: a group split, stratified by class.

    Each class gives `share` of its leakage groups. A group with two labels is for training:
    validation could not tell which one is right. Rank 0 reads the pictures for all ranks.
    """
    groups = broadcast_from_rank0(leakage_groups(faces, num_workers) if rank == 0 else None)
    assert groups is not None           # rank 0's
    names_by_label: dict[int, list[str]] = {}
    for name in sorted(groups):
        labels = set(faces.labels[groups[name]].tolist())
        if len(labels) == 1:
            names_by_label.setdefault(labels.pop(), []).append(name)
    generator = torch.Generator().manual_seed(seed)
    val_rows: set[int] = set()
    for _, names in sorted(names_by_label.items()):
        order = torch.randperm(len(names), generator=generator).tolist()
        for i in order[:max(1, round(share * len(names)))] if len(names) > 1 else ():
            val_rows.update(groups[names[i]])
    train_rows = [row for row in range(len(faces)) if row not in val_rows]
    return faces.subset(train_rows), faces.subset(sorted(val_rows))


def leakage_groups(faces: FaceSet, num_workers: int) -> dict[str, list[int]]:
    """Rows by group name: the pictures of a person's folder, or near-duplicates of a photograph.

    Where a class has MIN_PERSON_FOLDERS folders of a single class, folders are persons.
    """
    folders: dict[str, list[int]] = {}
    for row, file in enumerate(faces.files):
        folders.setdefault(str(Path(file).parent), []).append(row)
    n_pure = sum(len(set(faces.labels[rows].tolist())) == 1 for rows in folders.values())
    if n_pure >= MIN_PERSON_FOLDERS * len(faces.classes):
        return folders
    groups = group_duplicate_files(faces.paths(), num_workers, f"{faces.root}: near-duplicates")
    return {min(faces.files[row] for row in rows): rows for rows in groups}


def read_training_sets(roots: list[str], class_map: dict[str, str], val_share: float, seed: int,
                       num_workers: int, rank: int = 0) -> tuple[list[FaceSet], list[FaceSet]]:
    """Training and validation part of each set; all have the classes of the first.

    A set without a val folder is split by hold_out. Raises FaceSetError.
    """
    train_sets: list[FaceSet] = []
    val_sets: list[FaceSet] = []
    classes = None
    for root in roots:
        faces = read_faceset(root, "train", class_map, classes)
        classes = faces.classes
        if faces.unmatched:
            raise FaceSetError(
                f"{root}: folder {faces.unmatched[0]} matches no class of {roots[0]} "
                f"({', '.join(classes)}); --class_map {faces.unmatched[0]}=CLASS names its class")
        if (Path(root) / "val").is_dir():
            train, val = faces, read_faceset(root, "val", class_map, classes)
        else:
            train, val = hold_out(faces, val_share, seed, num_workers, rank)
        train_sets.append(train)
        val_sets.append(val)
    classes = train_sets[0].classes
    for name, sets in (("train", train_sets), ("validation", val_sets)):
        labels = torch.cat([faces.labels for faces in sets])
        counts = torch.bincount(labels, minlength=len(classes))
        if (counts == 0).any():
            raise FaceSetError(f"no {name} picture of class {classes[int(counts.argmin())]}")
    return train_sets, val_sets
