"""People that a consensus rule keeps and drops, by class: yield.json, its summary, votes.png."""
import os
from collections import Counter
from pathlib import Path

import numpy as np

from models.reports.votes import REASONS, ConsensusRule, Decisions, VoteTable
from models.running.files import atomic_write

# Bins of the histograms of shares. Their edges lie just below 0.05, 0.10, ..., so that 0.8 falls
# into the bin that begins with it.
SHARE_BINS = np.append(np.arange(20) / 20 - 1e-9, 1.0)
MAX_PAIRS = 20      # pairs of people with identical photos in the printed summary

DuplicatePhotos = dict[bytes, Counter]      # person -> other person -> number of identical photos


def yield_report(votes: VoteTable, decisions: Decisions, n_images: list[int],
                 duplicates: DuplicatePhotos, rule: ConsensusRule) -> dict:
    """The content of yield.json. n_images: photos of each class in train_list.csv."""
    per_class = class_yields(votes, decisions, n_images, rule.min_images)
    dropped_shares = {name: row["dropped"] / (row["dropped"] + row["kept"])
                      for name, row in per_class.items() if row["dropped"]}
    pairs = sorted((os.fsdecode(person), os.fsdecode(other), n)
                   for person, others in duplicates.items()
                   for other, n in others.items() if person < other)
    return {"people": len(votes.person_ids), "kept": int(decisions.is_kept.sum()),
            "images": int(votes.n_images.sum()), "asked": int(votes.n_sampled.sum()),
            "with_face": int(votes.n_faces.sum()), "train_images": sum(n_images),
            "images_of_nobody": votes.n_outside,
            "threshold": rule.threshold, "strict": rule.strict, "max_images": rule.max_images,
            "min_images": rule.min_images, "seed": rule.seed, "per_class": per_class,
            "loses_most": max(dropped_shares, key=lambda name: dropped_shares[name], default=None),
            "empty_classes": [name for name, row in per_class.items() if not row["kept"]],
            "dropped_because": {reason: int((decisions.reasons == i).sum())
                                for i, reason in enumerate(REASONS) if reason},
            "share_histogram": np.histogram(decisions.share[votes.n_faces > 0],
                                            SHARE_BINS)[0].tolist(),
            "same_pictures": pairs}


def class_yields(votes: VoteTable, decisions: Decisions, n_images: list[int],
                 min_images: int) -> dict[str, dict]:
    """People kept and dropped by class. A person counts for the class with most of its votes.

    kept_share is the share of the people with enough faces: the effect of the threshold alone.
    """
    yields = {}
    for c, name in enumerate(votes.classes):
        is_leading, n_kept = decisions.leading == c, int((decisions.labels == c).sum())
        n_too_few = int((is_leading & (votes.n_faces < min_images)).sum())
        n_judged = int(is_leading.sum()) - n_too_few
        yields[os.fsdecode(name)] = {
            "people": n_judged + n_too_few, "too_few_pictures": n_too_few, "kept": n_kept,
            "dropped": n_judged - n_kept, "kept_share": n_kept / n_judged if n_judged else None,
            "train_images": n_images[c]}
    return yields


def print_report(report: dict, folder: Path) -> None:
    """Prints a summary of yield.json."""
    print(f"{report['kept']:,} of {report['people']:,} people kept, {report['train_images']:,} "
          f"photos in {folder / 'train_list.csv'}; {report['asked']:,} photos classified, "
          f"{report['with_face']:,} with a face")
    width = max(len(name) for name in report["per_class"])
    print(f"{'':{width}} {'people':>9} {'too few':>9} {'kept':>9} {'dropped':>9}  kept share")
    for name, row in report["per_class"].items():
        share = "" if row["kept_share"] is None else f"{100 * row['kept_share']:.1f} %"
        print(f"{name:{width}} {row['people']:9,} {row['too_few_pictures']:9,} {row['kept']:9,} "
              f"{row['dropped']:9,}  {share:>10}")
    print("dropped: " + ", ".join(f"{reason} {n:,}"
                                  for reason, n in report["dropped_because"].items()))
    if report["loses_most"]:
        print(f"the rule drops the largest share of {report['loses_most']}: the people kept are "
              "not a representative sample of all people")
    if report["images_of_nobody"]:
        print(f"{report['images_of_nobody']:,} photos lie outside any person's folder and were "
              "ignored")
    pairs = report["same_pictures"]
    for person, other, n in pairs[:MAX_PAIRS]:
        print(f"possibly one person: {person!r} and {other!r} share {n} identical photos "
              "(see people.csv)")
    if len(pairs) > MAX_PAIRS:
        print(f"... and {len(pairs) - MAX_PAIRS:,} more such pairs in yield.json")
    for name in report["empty_classes"]:
        print(f"no person of class {name} is kept: train.py cannot learn this class from "
              "train_list.csv")


def draw_votes(path: Path, votes: VoteTable, decisions: Decisions, threshold: float) -> None:
    """Histograms of the most voted class's share of a person's faces, one panel for each class."""
    from matplotlib.figure import Figure  # takes a second to import, and not every process draws

    figure = Figure(figsize=(4.2 * len(votes.classes), 3.6), layout="tight")
    panels = figure.subplots(1, len(votes.classes), squeeze=False)[0]
    for c, (panel, name) in enumerate(zip(panels, votes.classes, strict=True)):
        shares = decisions.share[decisions.leading == c]
        is_kept = (decisions.labels == c)[decisions.leading == c]
        panel.hist([shares[is_kept], shares[~is_kept]], SHARE_BINS, stacked=True,
                   color=["tab:blue", "0.7"],
                   label=[f"kept {is_kept.sum():,}", f"dropped {(~is_kept).sum():,}"])
        panel.axvline(threshold, color="tab:red", linewidth=1)
        panel.set_title(os.fsdecode(name), parse_math=False)
        panel.set(xlabel="share of the person's faces", ylabel="people", xlim=(0, 1))
        panel.legend(loc="upper left", frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as temporary_path:
        figure.savefig(temporary_path, format="png", dpi=120)
