"""The flags of train.py that set hyperparameters, one for each field of TrainingSettings."""
import argparse
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from models.running import cli
from models.training.settings import RECIPES, TrainingSettings


def non_negative_float(text: str) -> float:
    """argparse type: a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expects a number of at least 0, got {text!r}")
    return value


def window(text: str) -> tuple[float, float, float, float]:
    """argparse type: '16,30,96,110' -> (16.0, 30.0, 96.0, 110.0)."""
    try:
        x0, y0, x1, y1 = (float(edge) for edge in text.split(","))
    except ValueError:
        x0 = y0 = x1 = y1 = 0.0
    if not (x0 < x1 and y0 < y1 and abs((x1 - x0) - (y1 - y0)) < 1e-6):
        raise argparse.ArgumentTypeError(f"expects the edges X0,Y0,X1,Y1 of a square, got {text!r}")
    return x0, y0, x1, y1


def input_sizes(text: str) -> tuple[tuple[float, int], ...]:
    """argparse type: '72:0.2,88:0.5,104' -> ((0.2, 72), (0.5, 88), (1.0, 104))."""
    try:
        pairs = [part.partition(":") for part in text.split(",")]
        steps = tuple((float(share or 1), int(size)) for size, _, share in pairs)
    except ValueError:
        steps = ()
    shares = [share for share, _ in steps]
    is_valid = steps and min(size for _, size in steps) >= 32 and shares[0] > 0 and shares[-1] == 1
    if not is_valid or any(b <= a for a, b in zip(shares, shares[1:], strict=False)):
        raise argparse.ArgumentTypeError(
            "expects SIZE:SHARE,...,SIZE with pixels of at least 32 and increasing shares of the "
            f"epochs, such as 72:0.2,88:0.5,104, got {text!r}")
    return steps


def add_hyperparameters(parser: cli.Parser) -> None:
    """--recipe and a flag for each hyperparameter; where it is not given the recipe decides."""
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="default",
                        help="default values of the flags below; refine and robust (against "
                             "domain shift) fine-tune the weights of --init, published is that of "
                             "EthnicityRecognition-UTKFaces")
    group = parser.add_argument_group("hyperparameters", "in brackets: --recipe default")

    def add(name: str, kind: Callable[[str], object], text: str, **options: Any) -> None:
        default = getattr(RECIPES["default"], name)
        group.add_argument(f"--{name}", type=kind, help=f"{text} ({default})",
                           metavar=None if "choices" in options else "N", **options)

    add("epochs", cli.positive_int, "passes over the training pictures")
    add("batch_size", cli.positive_int, "pictures per process and step")
    add("lr", cli.positive_float, "peak learning rate")
    add("schedule", str, "of the learning rate; step: a tenth every 20 epochs",
        choices=("cosine", "step"))
    add("warmup_epochs", non_negative_float, "linear learning-rate warm-up")
    add("weight_decay", non_negative_float, "of AdamW")
    add("label_smoothing", cli.fraction, "share of each target that is spread over the classes")
    add("mixup", cli.fraction, "share of the batches that mixup mixes")
    add("ema_decay", cli.fraction, "of the EMA of the weights, per step; 0: no EMA")
    add("aux_weight", non_negative_float, "loss weight of the auxiliary heads for age and gender, "
        "where manifest.csv has them; 0: no such heads")
    add("teacher_share", cli.fraction, "share of the soft targets of --teacher in each target")
    add("teacher_missing", str, "pictures that a table of --teacher lacks: end the program, learn "
        "the label alone, or leave them out", choices=("error", "label", "skip"))
    add("epoch_size", cli.non_negative_int, "pictures sampled per epoch; 0: every picture once")
    add("balance", cli.fraction, "of the sampled classes and, with auxiliary heads, genders: 0 as "
        "they are, 1 equal; with --epoch_size")
    add("outlier_share", cli.fraction, "share of --outliers among the sampled pictures")
    add("freeze", str, "layers of the backbone up to this one keep the weights of --init",
        choices=("", "bn1", "layer1", "layer2", "layer3"))
    add("shift", non_negative_float, "strength of the augmentation against domain shift: light, "
        "occlusion, greyscale, JPEG, loss of chroma; 0: off")
    add("calibrate_on", str, "validation pictures of the calibration: as they are, or half of them "
        "in greyscale, compressed, reduced or lit otherwise", choices=("clean", "mixture"))
    add("choose", str, "epoch to save: the best on validation, or the last",
        choices=("best", "last"))
    add("patience", cli.positive_int, "early stopping after so many epochs at the last input size "
        "without a lower validation loss")
    add("val_share", cli.fraction, "hold-out share of a set without a val folder, by person or by "
        "photograph")
    add("seed", cli.non_negative_int, "of hold-out, weights, order and augmentation")
    group.add_argument("--window", type=window, metavar="X0,Y0,X1,Y1",
                       help="square of the 112 x 112 template that the network sees (16,30,96,110)")
    group.add_argument("--input_sizes", type=input_sizes, metavar="SIZE:SHARE,...,SIZE",
                       help="pixels of the network's input, each up to a share of the epochs "
                            "(72:0.2,88:0.5,104)")
    group.add_argument("--augment", action=argparse.BooleanOptionalAction, default=None,
                       help="random geometry, colour, blur, erasing; off: shift and flip (on)")


def choose_settings(recipe: str, values: dict) -> TrainingSettings:
    """The settings of a recipe; values (by field name) that are not None replace its own."""
    names = {field.name for field in fields(TrainingSettings)}
    return replace(RECIPES[recipe], **{name: value for name, value in values.items()
                                       if name in names and value is not None})
