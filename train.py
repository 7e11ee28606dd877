"""Trains a ResNet-18 on labelled faces and writes the checkpoint of the best validation epoch.

Reads   --data: folders of utk_dataset_builder.py, folders of class folders, or CSV lists
        (image, class).
Writes  --out: weights, input specification and calibration
        <out stem>.log.jsonl: a line per epoch
        <out stem>_validation_loss.png: loss curves, beside --out or in --output_dir
        <out stem>.resume.pt: for --resume; removed at the end

    python train.py --data data/utk_races --out checkpoints/mine.pt
    torchrun --nproc_per_node=2 train.py --data data/utk_races --out checkpoints/mine.pt
"""
import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.data.faceset import FaceSet, FaceSetError, faceset_digest
from models.data.splits import read_training_sets
from models.faces.align import TEMPLATE
from models.faces.calibration import fit_calibration
from models.faces.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    save_atomically,
    save_checkpoint,
)
from models.faces.classifier import FaceClassifier, FaceSpec
from models.running import cli
from models.running.command import run_command
from models.running.ranks import init_distributed, shutdown_distributed
from models.training.auxiliary import class_weights
from models.training.crops import (
    VAL_RESOLUTION,
    CropLoading,
    Crops,
    crop_resolution,
    fits_on_device,
    load_crops,
    reduce_resolution,
    render_views,
)
from models.training.distillation import TeacherError, mix_in_soft_targets, read_teacher
from models.training.domain_shift import mixture_views
from models.training.epochs import predict_logits, train_one_epoch, validate
from models.training.flags import add_hyperparameters, choose_settings
from models.training.kernels import accelerate
from models.training.outliers import add_outliers, load_outliers
from models.training.plots import draw_losses
from models.training.process import Process
from models.training.sampling import class_and_gender, group_weights
from models.training.settings import TrainingSettings
from models.training.state import TrainingState, start_training

RESUME_INTERVAL = 20    # least seconds between resume files: one takes as long as a GPU's epoch
# beside the settings: equal in a resumed run
RESUME_FLAGS = ("data", "class_map", "init", "teacher", "outliers")


@dataclass(frozen=True)
class RunFiles:
    """The files that a run writes."""
    checkpoint: Path
    plot: Path

    @property
    def log(self) -> Path:
        """JSON lines, one per epoch."""
        return self.checkpoint.with_suffix(".log.jsonl")

    @property
    def resume(self) -> Path:
        """The state of an unfinished run."""
        return self.checkpoint.with_suffix(".resume.pt")


@dataclass(frozen=True)
class Run:
    """What does not change during a training run."""
    settings: TrainingSettings
    process: Process
    files: RunFiles
    flags: dict             # of the command line, as plain values
    train_files: dict = field(default_factory=dict)     # by --data: digest of the pictures' names

    @property
    def about(self) -> dict:
        """What checkpoints and resume files tell about the run."""
        return {"args": self.flags, "recipe": asdict(self.settings),
                "train_files": self.train_files}


def parse_args(argv: list[str] | None = None):
    """The flags; mistakes that can be found before anything slow starts end the program."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_data(parser, "folders or CSV lists (image, class); several are combined",
                 ["data/utk_races"], "+")
    cli.add_class_map(parser)
    add("--out", type=Path, default=Path("checkpoints/resnet18.pt"), metavar="FILE.pt",
        help="the checkpoint (%(default)s)")
    add("--output_dir", "--vis_dir", type=Path, help="folder of the loss curves (that of --out)")
    add("--init", default="random", metavar="random|imagenet|FILE",
        help="weights to start from; a checkpoint is fine-tuned (%(default)s)")
    add("--teacher", nargs="+", default=[], metavar="FILE",
        help="knowledge distillation: checkpoints of the same classes, or tables of all of --data "
             "by facesets/second_opinion.py (.csv)")
    add("--outliers", type=Path, metavar="DIR",
        help="outlier exposure: faces of no class, whose target is the same probability for each; "
             "needs --epoch_size")
    add("--crop_cache", type=Path, metavar="DIR",
        help="keep aligned crops in this folder, for further runs")
    add_hyperparameters(parser)
    add("--resume", action="store_true", help="continue after the last saved epoch")
    cli.add_overwrite(parser, "replace the checkpoint of an earlier run")
    cli.add_device(parser)
    cli.add_num_workers(parser, default=cli.worker_count())
    return parser, parser.parse_args(argv)


def plain_flags(args) -> dict:
    """The flags that have a value, as plain values: they are saved in checkpoints."""
    return {name: str(value) if isinstance(value, (Path, torch.device)) else value
            for name, value in vars(args).items() if value is not None}


def check_outputs(parser: cli.Parser, args, run: Run) -> None:
    """Ends the program where a file of an earlier run would be lost, or cannot be continued."""
    files = run.files
    cli.output_folder(parser, "--out", files.checkpoint.parent)
    cli.output_folder(parser, "--output_dir", files.plot.parent)
    for teacher in args.teacher:
        if Path(teacher).resolve() == files.checkpoint.resolve():
            parser.error(f"--teacher {teacher}: --out would replace it")
    if not args.resume:
        cli.refuse_existing(parser, "--out", [files.checkpoint, files.resume], args.overwrite)
        return
    if not files.resume.is_file():
        parser.error(f"--resume: there is no {files.resume} to continue from")
    state = torch.load(files.resume, map_location="cpu", weights_only=True, mmap=True)
    if difference := find_difference(state, run):
        parser.error(f"--resume: {files.resume} was begun with another {difference}")


def find_difference(state: dict, run: Run) -> str | None:
    """The first flag in which a resume file differs from this run, or the number of processes."""
    begun, now = state["args"] | state["recipe"], run.flags | asdict(run.settings)
    for name in (*RESUME_FLAGS, *asdict(run.settings)):
        if name != "patience" and begun.get(name) != now.get(name):
            return f"--{name} ({begun.get(name)}, now {now.get(name)})"
    begun_size, world_size = state["world_size"], run.process.world_size
    if begun_size != world_size:
        return f"number of processes ({begun_size}, now {world_size})"
    return None


def warn_of_leakage(teachers: list[tuple], init: str, train_files: dict[str, str]) -> None:
    """Prints a warning for each checkpoint that may have been trained on validation pictures.

    teachers: (file, teacher). train_files: digest of the training pictures' names by --data.
    """
    networks = [("--teacher", path, teacher) for path, teacher in teachers
                if isinstance(teacher, Checkpoint)]
    if init not in ("random", "imagenet"):
        networks.append(("--init", init, load_checkpoint(init)))
    for flag, path, network in networks:
        digests = network.metadata.get("train_files")
        if digests and not set(train_files.values()) <= set(digests.values()):
            print(f"warning: {flag} {path} was trained on another selection of pictures; if it is "
                  "of the same sets, it may have seen validation pictures and val accuracy is high")


def load_data(run: Run, train_sets: list[FaceSet], val_sets: list[FaceSet], teachers: list[tuple],
              num_workers: int) -> tuple[Crops, Crops]:
    """Training crops with the targets to learn, and validation crops. Raises TeacherError."""
    settings, process, roots = run.settings, run.process, run.flags["data"]
    cache = run.flags.get("crop_cache")
    loading = CropLoading(crop_resolution(settings.window, settings.input_size), num_workers,
                          cache and Path(cache))
    train = load_crops(train_sets, [f"train {root}" for root in roots], loading, process,
                       has_aux=settings.aux_weight > 0)
    val = load_crops(val_sets, [f"validation {root}" for root in roots],
                     replace(loading, resolution=VAL_RESOLUTION), process)
    if teachers:
        train = mix_in_soft_targets(teachers, train, settings.teacher_share, process,
                                    settings.teacher_missing)
    if settings.epoch_size:
        n_classes = len(train_sets[0].classes)
        train = arrange_sampling(run, train, loading, n_classes)
    return train, val


def arrange_sampling(run: Run, train: Crops, loading: CropLoading, n_classes: int) -> Crops:
    """Training crops with sampling weights, and with the pictures of --outliers."""
    train.weights = group_weights(class_and_gender(train, n_classes), run.settings.balance)
    if "outliers" not in run.flags:
        return train
    outliers = load_outliers(Path(run.flags["outliers"]), n_classes, train.targets.shape[1],
                             loading, run.process)
    return add_outliers(train, outliers, run.settings.outlier_share)


def restore(training: TrainingState, run: Run) -> None:
    """Continues from the resume file; epochs after it are dropped from the log and repeated."""
    training.load_state_dict(torch.load(run.files.resume, map_location=run.process.device,
                                        weights_only=True))
    log = run.files.log
    if run.process.is_main:
        lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
        log.write_text("".join(line for line in lines
                               if json.loads(line)["epoch"] <= training.epoch))


def run_epochs(run: Run, training: TrainingState, train: Crops, val: Crops) -> None:
    """Trains up to the last epoch or early stopping; writes log, checkpoint and resume file."""
    settings, process = run.settings, run.process
    ddp = None
    if process.world_size > 1:
        ddp = DistributedDataParallel(training.model, broadcast_buffers=False)
    keep_on_device = fits_on_device(train.pixels, process.device)
    input_size = None
    while training.epoch < settings.epochs and training.stale_epochs < settings.patience:
        if input_size != settings.input_size_at(training.epoch):
            input_size = settings.input_size_at(training.epoch)
            crops = train.to(process.device) if keep_on_device else train
            crops = replace(crops, pixels=reduce_resolution(
                crops.pixels, crop_resolution(settings.window, input_size)))
            val_views = render_views(val.pixels, settings.window, input_size, process.device)
            network = None                          # frees its memory before the next one is made
            network = ddp or training.model     # CUDA graphs would train frozen batch norms
            if not ddp and not settings.freeze:
                network = accelerate(training.model, input_size, training.amp_dtype,
                                     settings.batch_size)
        figures = run_epoch(run, training, network, crops, val_views, val.labels)
        finish_epoch(training, run, figures)


def run_epoch(run: Run, training: TrainingState, network: nn.Module, crops: Crops,
              val_views: Tensor, val_labels: Tensor) -> dict:
    """Trains one epoch and validates; the figures of its line in the log."""
    input_size = val_views.shape[-1]
    start = time.perf_counter()
    train_loss = train_one_epoch(training, network, crops, input_size, run.settings, run.process)
    seconds = time.perf_counter() - start
    val_loss, confusion = validate(validated_model(training, run.settings), val_views, val_labels,
                                   run.process)
    training.epoch += 1
    n_samples = run.settings.epoch_size or len(crops.labels)
    return {"epoch": training.epoch, "train_loss": train_loss, "val_loss": val_loss,
            "val_accuracy": confusion.trace().item() / confusion.sum().item(),
            "lr": training.optimizer.param_groups[0]["lr"], "input_size": input_size,
            "seconds": seconds, "images_per_second": n_samples / seconds}


def validated_model(training: TrainingState, settings: TrainingSettings) -> FaceClassifier:
    """The network that is validated and saved: the EMA, or the model itself without one."""
    return training.ema_model if settings.ema_decay else training.model.eval()


def finish_epoch(training: TrainingState, run: Run, figures: dict) -> None:
    """Prints and logs an epoch; saves the checkpoint if it is chosen, and a resume file in time."""
    settings, files = run.settings, run.files
    is_last_size = figures["input_size"] == settings.input_size
    if is_last_size:                                # smaller inputs only lead up to it
        is_lower = figures["val_loss"] < training.lowest_loss
        training.stale_epochs = 0 if is_lower else training.stale_epochs + 1
        training.lowest_loss = min(training.lowest_loss, figures["val_loss"])
    is_better = training.best is None or figures["val_accuracy"] > training.best["val_accuracy"]
    is_chosen = is_last_size and (is_better or settings.choose == "last")
    if is_chosen:
        training.best = figures
    if not run.process.is_main:
        return
    print_epoch(figures, settings.epochs, is_chosen)
    with open(files.log, "a") as log:
        log.write(json.dumps(figures) + "\n")
    if is_chosen:
        model = validated_model(training, settings)
        about = {"epoch": figures["epoch"], "best": figures, **run.about}
        save_checkpoint(files.checkpoint, Checkpoint(model.spec, class_weights(model), None, about))
    if time.monotonic() - training.saved_at >= RESUME_INTERVAL:
        save_atomically(training.state_dict() | run.about | {"world_size": run.process.world_size},
                        files.resume)
        training.saved_at = time.monotonic()


def print_epoch(figures: dict, epochs: int, is_chosen: bool) -> None:
    """Prints the line of an epoch; * marks the one in the checkpoint."""
    print(f"epoch {figures['epoch']:3d}/{epochs}  {figures['input_size']} px  train loss "
          f"{figures['train_loss']:.4f}  val loss {figures['val_loss']:.4f}  val accuracy "
          f"{100 * figures['val_accuracy']:.2f} %  lr {figures['lr']:.6f}  "
          f"{figures['seconds']:.0f} s  {figures['images_per_second']:.0f} images/s"
          f"{'  *' if is_chosen else ''}", flush=True)


def calibrate(path: Path, val: Crops, settings: TrainingSettings, device: torch.device) -> None:
    """Fits the calibration of a saved checkpoint to the validation crops, and saves it again."""
    checkpoint = load_checkpoint(path)
    spec = checkpoint.spec
    views = render_views(val.pixels, spec.window, spec.input_size, device)
    if settings.calibrate_on == "mixture":
        views = mixture_views(views, settings.seed)
    logits = predict_logits(checkpoint.classifier(device), views)
    checkpoint.calibration = fit_calibration(logits, val.labels)
    save_checkpoint(path, checkpoint)


def prepare(args, run: Run) -> tuple[Run, TrainingState, Crops, Crops]:
    """Reads sets, weights and teachers: the run, its state, training and validation crops.

    Raises FaceSetError, CheckpointError (of --init) and TeacherError.
    """
    settings, process = run.settings, run.process
    train_sets, val_sets = read_training_sets(args.data, args.class_map, settings.val_share,
                                              settings.seed, args.num_workers, process.rank)
    run = replace(run, train_files={root: faceset_digest(faces.files) for root, faces
                                    in zip(args.data, train_sets, strict=True)})
    spec = FaceSpec(train_sets[0].classes, TEMPLATE, settings.window, settings.input_size)
    training = start_training(spec, settings, args.init, process.device)
    may_lack = settings.teacher_missing != "error"
    teachers = [(path, read_teacher(path, spec.classes, train_sets, val_sets, may_lack))
                for path in args.teacher]
    if process.is_main:
        warn_of_leakage(teachers, args.init, run.train_files)
    train, val = load_data(run, train_sets, val_sets, teachers, args.num_workers)
    if args.resume:
        restore(training, run)
    elif process.is_main:
        run.files.log.unlink(missing_ok=True)
        run.files.resume.unlink(missing_ok=True)
    if process.is_main:
        print(f"{len(train.labels)} training and {len(val.labels)} validation pictures of "
              f"{', '.join(spec.classes)}; {process.device}, {training.amp_dtype or torch.float32}",
              flush=True)
    return run, training, train, val


def main(argv: list[str] | None = None) -> None:
    """Trains, calibrates on the validation pictures, and draws the loss curves."""
    parser, args = parse_args(argv)
    process = Process(*init_distributed(args.device))
    plot = (args.output_dir or args.out.parent) / f"{args.out.stem}_validation_loss.png"
    run = Run(choose_settings(args.recipe, vars(args)), process, RunFiles(args.out, plot),
              plain_flags(args))
    settings = run.settings
    if settings.input_size_at(settings.epochs - 1) != settings.input_size:
        parser.error(f"--epochs {settings.epochs}: too few to reach the last of --input_sizes, "
                     f"{settings.input_size}")
    if args.outliers and not settings.epoch_size:
        parser.error("--outliers: needs --epoch_size")
    if process.is_main:
        check_outputs(parser, args, run)
    try:
        run, training, train, val = prepare(args, run)
        start = time.monotonic()
        run_epochs(run, training, train, val)
    except FaceSetError as error:
        parser.error(f"--data: {error}")
    except CheckpointError as error:
        parser.error(f"--init {args.init}: {error}")
    except TeacherError as error:
        parser.error(f"--teacher {error}")
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    if process.is_main:
        calibrate(args.out, val, run.settings, process.device)
        draw_losses(run.files.log, plot)
        run.files.resume.unlink()
        print(f"{args.out}: epoch {training.best['epoch']}, validation accuracy "
              f"{100 * training.best['val_accuracy']:.2f} %, {time.monotonic() - start:.1f} s")
    shutdown_distributed()


if __name__ == "__main__":
    run_command(main, "--resume continues after the last saved epoch")
