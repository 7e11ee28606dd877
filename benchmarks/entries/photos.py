"""photos: a folder of photographs -> predictions.csv, against one photograph at a time."""
from pathlib import Path

from benchmarks import baseline
from benchmarks.agreement import agreement_bars, both_agreements, same_labels
from benchmarks.entries.classify import label_folder
from benchmarks.harness import Result, take_turns
from benchmarks.inputs import Bench
from models.faces.mtcnn import MTCNN
from models.faces.predictor import Predictor

PUBLISHED = (
    "deepface, race model on a Titan V: 0.48 images/s (serengil/deepface#253)",
    "FairFace predict.py: 0.06 to 2.5 images/s (dchen236/FairFace#33, joojs/fairface#17)",
    "facenet-pytorch MTCNN, detection alone, on a P100: 13 photographs/s at 1080p, 20 at 720p, "
    "25 at 540p (its README)",
)


def bench_photos(bench: Bench) -> Result:
    """Ordinary photographs -> predictions.csv, the largest face of each, smallest face 20.

    The labels are compared on chips too, because one near-tie among the 194 faces of the
    photographs would be more than 0.2 %.
    """
    result, sizes, paths = Result(), bench.sizes, bench.photos()
    folder, plain_table = str(Path(paths[0]).parent), bench.folder / "plain_photos.csv"
    predictor = Predictor(bench.checkpoint, bench.device)
    detector = MTCNN(min_face_size=20).to(bench.device)
    plain_classifier = baseline.PlainClassifier(bench.checkpoint, bench.device)
    plain_mtcnn = baseline.PlainMTCNN(20, bench.device)

    def label_one_by_one(items: list[str]) -> None:
        baseline.label_photos(list(map(Path, items)), plain_table, plain_mtcnn, plain_classifier)

    ours, other = result.figures = take_turns("photographs, end to end", {
        "ours, files to predictions.csv": (
            lambda _: label_folder(bench, folder, predictor, detector), paths),
        "one photograph after another": (label_one_by_one, paths)},
        sizes.runs, bench.device, warm=8)
    result.compare("photographs: ratio to one after another", ours, other, 4.0)
    on_photos = same_labels(bench.folder / "out" / "predictions.csv", plain_table)
    chips = bench.chips(sizes.agreed)
    table = label_folder(bench, str(Path(chips[0]).parent), predictor, detector,
                         "--align", "always")
    label_one_by_one(chips)
    on_chips = same_labels(table, plain_table)
    result.agreement |= {"photographs": on_photos, "chips": on_chips}
    result.bars += agreement_bars("photographs and chips", both_agreements(on_photos, on_chips))
    result.notes += [f"published: {line}" for line in PUBLISHED]
    return result
