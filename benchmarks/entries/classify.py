"""classify: a folder of aligned crops -> predictions.csv, against batches of one."""
import shutil
from pathlib import Path

import torch
from torch import Tensor

import infer
from benchmarks import baseline
from benchmarks.agreement import agreement_bars, same_labels
from benchmarks.harness import Result, take_turns
from benchmarks.inputs import Bench
from models.data.batches import load_photos
from models.data.chunks import DECODE_BATCH, count_files
from models.faces.align import TEMPLATE_SIZE, crop_views
from models.faces.mtcnn import MTCNN
from models.faces.pipeline import Classification, FacePolicy, Loading, decode_workers
from models.faces.predictions import Thresholds
from models.faces.predictor import Predictor, network_batch_size
from models.running.threads import OrderedThreadPool


def label_folder(bench: Bench, folder: str, predictor: Predictor, detector: MTCNN | None,
                 *flags: str) -> Path:
    """The predictions.csv of a folder, by the steps of infer.py without start and summary.

    The networks are loaded already.
    """
    parser, out = infer.build_parser(), bench.folder / "out"
    args = parser.parse_args(["--input_dir", str(folder), "--output_dir", str(out), "--ckpt",
                              bench.ckpt, "--device", str(bench.device), "--overwrite", *flags])
    infer.check_flags(parser, args)
    run = infer.open_run(parser, args, 0)
    n_files = count_files(len(run.photos), run.open_chunks)
    labelling = infer.Labelling(
        predictor, detector, FacePolicy(args.faces, align=args.align),
        Loading(num_workers=decode_workers(args.num_workers, n_files, bench.device),
                max_side=args.max_side),
        Classification(network_batch_size(bench.device), args.flip),
        Thresholds.of_checkpoint(bench.checkpoint, args.alpha, args.min_confidence or 0.0,
                                 args.target_error),
        with_crops=False)
    infer.label_chunks(run, run.open_chunks, labelling, show_progress=False)
    infer.merge_run(run, bench.checkpoint.spec.classes)
    run.photos.close()
    shutil.rmtree(run.folder)
    return out / "predictions.csv"


def bench_classify(bench: Bench) -> Result:
    """Aligned crops, 112 x 112 JPEG files -> predictions.csv."""
    result, sizes, spec = Result(), bench.sizes, bench.checkpoint.spec
    paths = bench.crops(sizes.crops, TEMPLATE_SIZE)
    plain_paths = paths[::len(paths) // sizes.plain_crops][:sizes.plain_crops]
    folder, plain_table = str(Path(paths[0]).parent), bench.folder / "plain_crops.csv"
    predictor = Predictor(bench.checkpoint, bench.device)
    plain = baseline.PlainClassifier(bench.checkpoint, bench.device)
    images = torch.cat([batch.images for batch in load_photos(paths, DECODE_BATCH, 0)])
    views = crop_views(images, spec.window, spec.input_size, spec.template).to(bench.device)
    ready = views.split(network_batch_size(bench.device))
    num_workers = decode_workers(None, len(paths), bench.device)
    ours, network, decoding, other = figures = take_turns("aligned crops", {
        "ours, files to predictions.csv": (
            lambda _: label_folder(bench, folder, predictor, None), paths),
        "network alone, ready tensors": (lambda _: label_ready(ready, predictor), paths),
        "decoding alone": (lambda _: decode_all(paths, num_workers, bench.device), paths),
        "one file after another": (
            lambda items: baseline.label_crops(list(map(Path, items)), plain_table, plain),
            plain_paths)},
        sizes.runs, bench.device, warm=16)
    result.figures += figures
    result.compare("aligned crops: ratio to one file after another", ours, other, 2.5)
    ceiling = min(network, decoding, key=lambda figure: figure.rate)
    result.compare("aligned crops: ratio to the ceiling", ours, ceiling, 0.9)
    result.notes.append("the ceiling is the slower one of the network alone on ready tensors and "
                        "decoding alone")
    agreement = same_labels(bench.folder / "out" / "predictions.csv", plain_table)
    result.agreement["aligned crops"] = agreement
    result.bars += agreement_bars("aligned crops", agreement)
    return result


def label_ready(ready: tuple[Tensor, ...], predictor: Predictor) -> None:
    """Runs the network over ready views as infer.py does, and nothing else."""
    with OrderedThreadPool(predictor.device) as pool:
        for _ in pool.ordered_map(predictor.probs, ready):
            pass


def decode_all(paths: list[str], num_workers: int, device: torch.device) -> None:
    """Decodes files as infer.py does; the pictures are discarded."""
    with OrderedThreadPool(device) as pool:
        for _ in load_photos(paths, DECODE_BATCH, num_workers, pool=pool):
            pass
