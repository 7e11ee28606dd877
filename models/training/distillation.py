"""Knowledge distillation: soft targets of checkpoints and of CSV tables, mixed into the targets."""
import csv
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from models.data.faceset import FaceSet
from models.faces.align import crop_views
from models.faces.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from models.faces.predictor import Predictor, network_batch_size
from models.training.crops import Crops
from models.training.process import Process

SoftTargets = dict[str, list[float]]    # probabilities by absolute path; [] if unreadable


class TeacherError(Exception):
    """A teacher that cannot be used; the message names its file and says why."""


def read_teacher(path: str, classes: tuple[str, ...], train_sets: list[FaceSet],
                 val_sets: list[FaceSet], may_lack: bool = False) -> Checkpoint | SoftTargets:
    """A teacher: a checkpoint of the same classes, or a table (.csv) that covers the training sets.

    may_lack: a table may lack training pictures. Raises TeacherError, also for a table with
    pictures of the validation sets.
    """
    if path.endswith(".csv"):
        table = read_soft_targets(path, classes)
        check_coverage(path, table, [] if may_lack else train_sets, val_sets)
        return table
    try:
        teacher = load_checkpoint(path)
    except CheckpointError as error:
        raise TeacherError(f"{path}: {error}") from None
    if teacher.spec.classes != classes:
        raise TeacherError(f"{path}: its classes are {', '.join(teacher.spec.classes)}; "
                           f"--data has {', '.join(classes)}")
    return teacher


def check_coverage(path: str, table: SoftTargets, train_sets: list[FaceSet],
                   val_sets: list[FaceSet]) -> None:
    """Raises TeacherError unless a table has all training pictures and no validation picture."""
    train_paths, val_paths = ([os.path.abspath(file) for faces in sets for file in faces.paths()]
                              for sets in (train_sets, val_sets))
    if missing := next((file for file in train_paths if file not in table), None):
        raise TeacherError(f"{path}: it has no row for {missing}")
    if leaked := next((file for file in val_paths if file in table), None):
        raise TeacherError(f"{path}: it was fitted on {leaked}, which is a validation picture "
                           "here; use the same --data, --class_map, --val_share and --seed")


def read_soft_targets(path: str, classes: tuple[str, ...]) -> SoftTargets:
    """The table of a CSV with columns image (absolute, or relative to the CSV) and p_<class>...

    Empty cells stand for an unreadable picture. Raises TeacherError.
    """
    columns, table = [f"p_{name}" for name in classes], {}
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            missing = {"image", *columns} - set(reader.fieldnames or ())
            if missing:
                raise TeacherError(f"{path}: it has no column {min(missing)}")
            for row in reader:
                has_values = any(row[name] for name in columns)
                probs = [float(row[name]) for name in columns] if has_values else []
                is_distribution = not probs or min(probs) >= 0 and abs(sum(probs) - 1) < 0.01
                if not row["image"] or not is_distribution:
                    raise TeacherError(f"{path}: line {reader.line_num} has no image, or its "
                                       "probabilities do not add up to 1")
                table[os.path.abspath(Path(path).parent / row["image"])] = probs
    except OSError as error:
        raise TeacherError(f"{path}: {error.strerror}") from None
    except (csv.Error, TypeError, ValueError) as error:
        raise TeacherError(f"{path}: it cannot be read ({error})") from None
    return table


def mix_in_soft_targets(teachers: list[tuple[str, Checkpoint | SoftTargets]], crops: Crops,
                        teacher_share: float, process: Process, missing: str = "error") -> Crops:
    """The crops with `teacher_share` of the class targets replaced by the teachers' soft targets.

    teachers: files and their contents. Several are combined by the geometric mean of their
    probabilities. missing: of pictures without probabilities in a table, the 'label' stays the
    target, or they are left out ('skip'), or TeacherError is raised ('error').
    """
    is_taught = torch.ones(len(crops.paths), dtype=torch.bool)
    logs = []
    for path, teacher in teachers:
        if isinstance(teacher, Checkpoint):
            probs = teacher_probabilities(teacher, crops.pixels, process)
        else:
            unread = next((file for file in crops.paths if not teacher.get(file)), None)
            if unread and missing == "error":
                raise TeacherError(f"{path}: it has no probabilities for {unread}")
            is_taught &= torch.tensor([bool(teacher.get(file)) for file in crops.paths])
            placeholder = next((values for values in teacher.values() if values), None)
            if placeholder is None:
                raise TeacherError(f"{path}: it has no probabilities")
            probs = torch.tensor([teacher.get(file) or placeholder for file in crops.paths])
        logs.append(probs.clamp(min=1e-6).log())
    soft_targets = torch.stack(logs).mean(0).softmax(1)
    share = teacher_share * is_taught[:, None].float()
    crops.targets[:, :soft_targets.shape[1]].lerp_(soft_targets, share)
    return crops.subset(is_taught.nonzero()[:, 0]) if missing == "skip" else crops


def teacher_probabilities(teacher: Checkpoint, crops: Tensor, process: Process) -> Tensor:
    """Probabilities (N, C) float32 by test-time augmentation over four views of each crop.

    These are the teacher's window and a tighter one, and both mirrored. The mean is more accurate
    than one view; the student needs only one. The class biases of the teacher's calibration are
    left out: the student's own calibration fits new ones.
    """
    if teacher.calibration:
        unbiased = replace(teacher.calibration, bias=(0.0,) * len(teacher.spec.classes))
        teacher = replace(teacher, calibration=unbiased)
    predictor, spec = Predictor(teacher, process.device), teacher.spec
    inset = 0.04 * (spec.window[2] - spec.window[0])
    x0, y0, x1, y1 = spec.window
    tight = (x0 + inset, y0 + inset, x1 - inset, y1 - inset)
    probs = torch.empty(len(crops), len(spec.classes))
    batches = torch.arange(len(crops)).split(network_batch_size(process.device))
    for rows in tqdm(batches, desc="teacher", disable=not process.is_main, unit="batch"):
        pixels = crops[rows].to(process.device)
        views = [crop_views(pixels, window, spec.input_size, spec.template)
                 for window in (spec.window, tight)]
        probs[rows] = sum(predictor.probs(view, flip=True) for view in views) / 2
    return probs
