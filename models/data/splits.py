"""Which pictures of a labelled set are trained on, and which are validated on."""
from pathlib import Path

import torch

from models.data.duplicates import group_duplicate_files
from models.data.faceset import FaceSet, FaceSetError, read_faceset
from models.running.ranks import broadcast_from_rank0

MIN_PERSON_FOLDERS = 5      # folders per class from which on a picture's folder is taken for a person's


def hold_out(faces: FaceSet, share: float, seed: int, workers: int = 0, rank: int = 0) -> tuple[FaceSet, FaceSet]:
    """Train and validation parts of a set that has none; rank 0 looks at the pictures for all ranks.

    Each class gives `share` of its groups, which are never divided. One with two labels is trained
    on: validation would not know which is right.
    """
    groups = broadcast_from_rank0(leakage_groups(faces, workers) if rank == 0 else None)
    by_label: dict[int, list[str]] = {}
    for name in sorted(groups):
        labels = set(faces.labels[groups[name]].tolist())
        if len(labels) == 1:
            by_label.setdefault(labels.pop(), []).append(name)
    generator, held = torch.Generator().manual_seed(seed), set()
    for _, names in sorted(by_label.items()):
        order = torch.randperm(len(names), generator=generator).tolist()
        for i in order[:max(1, round(share * len(names)))] if len(names) > 1 else ():
            held.update(groups[names[i]])
    return faces.subset([row for row in range(len(faces)) if row not in held]), faces.subset(sorted(held))


def leakage_groups(faces: FaceSet, workers: int) -> dict[str, list[int]]:
    """Rows of a set that belong together, by a name: those of a person's folder, or else of one photograph.

    Folders of a single class are taken for persons' where there are MIN_PERSON_FOLDERS of them per
    class.
    """
    folders: dict[str, list[int]] = {}
    for row, file in enumerate(faces.files):
        folders.setdefault(str(Path(file).parent), []).append(row)
    n_pure = sum(len(set(faces.labels[rows].tolist())) == 1 for rows in folders.values())
    if n_pure >= MIN_PERSON_FOLDERS * len(faces.classes):
        return folders
    same = group_duplicate_files(faces.paths(), workers, f"{faces.root}: looking for equal pictures")
    return {min(faces.files[row] for row in rows): rows for rows in same}


def read_training_sets(args) -> tuple[list[FaceSet], list[FaceSet]]:
    """Training and validation part of each of args.data; all with the classes of the first. Raises FaceSetError.

    args: data, class_map, val_share, seed, workers, rank, as the flags of train.py.
    """
    train, val, classes = [], [], None
    for root in args.data:
        whole = read_faceset(root, "train", args.class_map, classes)
        classes = whole.classes
        if whole.unmatched:
            raise FaceSetError(f"{root}: folder {whole.unmatched[0]} matches no class of {args.data[0]} "
                               f"({', '.join(classes)}); --class_map {whole.unmatched[0]}=CLASS names its class")
        if (Path(root) / "val").is_dir():
            train.append(whole)
            val.append(read_faceset(root, "val", args.class_map, classes))
        else:
            parts = hold_out(whole, args.val_share, args.seed, args.workers, args.rank)
            train.append(parts[0])
            val.append(parts[1])
    for name, sets in (("train", train), ("validation", val)):
        counts = sum(torch.bincount(faces.labels, minlength=len(classes)) for faces in sets)
        if (counts == 0).any():
            raise FaceSetError(f"no {name} picture of class {classes[int(counts.argmin())]}")
    return train, val
