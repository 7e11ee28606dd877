"""Agreement of the results of two procedures: detected faces, and tables of predictions."""
import csv
from pathlib import Path

import numpy as np
import torchvision

from benchmarks.harness import Bar
from models.faces.mtcnn import Faces
from models.faces.predictions import read_predictions

# Two classes whose probabilities differ by less may change places if both may move by 0.02.
NEAR_TIE = 0.04


def same_faces(ours: list[Faces], plain: list[Faces]) -> dict:
    """Faces of the plain procedure with a counterpart in ours, and the distance of landmarks.

    A counterpart has an IoU of at least 0.9.
    """
    n_same, distances = 0, [0.0]
    for our_faces, plain_faces in zip(ours, plain, strict=True):
        if len(our_faces.boxes) and len(plain_faces.boxes):
            overlap, match = torchvision.ops.box_iou(plain_faces.boxes, our_faces.boxes).max(1)
            is_same = overlap >= 0.9
            n_same += int(is_same.sum())
            offsets = our_faces.landmarks[match[is_same]] - plain_faces.landmarks[is_same]
            distances += offsets.norm(dim=2).flatten().tolist()
    return {"faces": sum(len(faces.boxes) for faces in ours),
            "plain_faces": sum(len(faces.boxes) for faces in plain),
            "same": n_same, "landmarks_apart_px": max(distances)}


def same_labels(ours: Path, plain: Path) -> dict:
    """Agreement of two tables of predictions on the files of the plain one.

    near_ties: the differing labels whose two largest probabilities in the plain table are at most
    NEAR_TIE apart.
    """
    our_rows = {Path(row["file"]).name: row for row in read_predictions(ours)}
    with open(plain, newline="", encoding="utf-8") as file:
        plain_rows = list(csv.DictReader(file))
    n_faces, n_different, n_near_ties, n_statuses, largest_difference = 0, 0, 0, 0, 0.0
    for plain_row in plain_rows:
        row = our_rows[plain_row["file"]]
        if plain_row["status"] != "ok" or row["status"] != "ok":
            n_statuses += plain_row["status"] != row["status"]
            continue
        names = [name for name in plain_row if name.startswith("p_")]
        plain_probs, probs = (np.array([float(r[name]) for name in names])
                              for r in (plain_row, row))
        n_faces += 1
        largest_difference = max(largest_difference, float(np.abs(plain_probs - probs).max()))
        if plain_probs.argmax() != probs.argmax():
            n_different += 1
            n_near_ties += bool(np.diff(np.sort(plain_probs)[-2:])[0] <= NEAR_TIE)
    return {"files": len(plain_rows), "other_status": n_statuses, "faces": n_faces,
            "other_label": n_different, "near_ties": n_near_ties,
            "largest_difference": largest_difference}


def both_agreements(first: dict, second: dict) -> dict:
    """The results of same_labels on two sets of pictures, combined."""
    return {key: max(value, second[key]) if key == "largest_difference" else value + second[key]
            for key, value in first.items()}


def agreement_bars(name: str, agreement: dict) -> list[Bar]:
    """The three targets for two tables of predictions."""
    n_files = max(1, agreement["faces"] + agreement["other_status"])
    same_share = (agreement["faces"] - agreement["other_label"]) / n_files
    n_clear = agreement["other_label"] - agreement["near_ties"]
    return [Bar(f"{name}: labels that agree, %", 100 * same_share, least=99.8),
            Bar(f"{name}: largest difference of a probability", agreement["largest_difference"],
                most=0.02),
            Bar(f"{name}: other labels that are no near-tie", n_clear, most=0)]
