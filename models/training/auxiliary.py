"""Auxiliary heads: age band and gender, learnt beside the classes and dropped after training."""
import torch
from torch import Tensor, nn

from models.data.faceset import GENDERS, FaceSet, read_manifest
from models.faces.classifier import FaceClassifier

AGE_BANDS = (0, 5, 10, 18, 26, 34, 44, 56, 70)      # lower ends, years
AUX_OUTPUTS = (len(AGE_BANDS), len(GENDERS))        # of the two heads


def aux_targets(faces: FaceSet) -> Tensor:
    """Age bands and genders (N, 9 + 2), mostly one-hot; zeros where manifest.csv has no value."""
    targets = torch.zeros(len(faces), sum(AUX_OUTPUTS))
    manifest = read_manifest(faces.root, faces.files)
    for row, file in enumerate(faces.files if manifest else ()):
        age, gender = manifest[file]["age"] or "", manifest[file]["gender"]
        targets[row, :len(AGE_BANDS)] = age_target(age)
        if gender in GENDERS:
            targets[row, len(AGE_BANDS) + int(gender)] = 1
    return targets


def age_target(age: str) -> Tensor:
    """Shares (9,) of the age bands: one-hot for '31', by the years of each for '30-39'; or zeros.

    FairFace has ranges of years, and 'more than 70'.
    """
    first, _, last = age.removeprefix("more than ").partition("-")
    if not first.isdecimal() or last and not last.isdecimal():
        return torch.zeros(len(AGE_BANDS))
    years = torch.arange(int(first), int(last or first) + 1)
    bands = torch.bucketize(years, torch.tensor(AGE_BANDS), right=True) - 1
    return torch.bincount(bands, minlength=len(AGE_BANDS)) / len(years)


def add_aux_heads(model: FaceClassifier) -> None:
    """Appends the outputs of the auxiliary heads to the last layer; those of the classes stay."""
    head = model.backbone.fc
    wide = nn.Linear(head.in_features, head.out_features + sum(AUX_OUTPUTS))
    with torch.no_grad():
        wide.weight[:head.out_features], wide.bias[:head.out_features] = head.weight, head.bias
    model.backbone.fc = wide


def class_weights(model: FaceClassifier) -> dict[str, Tensor]:
    """The network's weights without the auxiliary heads."""
    n_classes = len(model.spec.classes)
    return {key: value[:n_classes] if key.startswith("fc.") else value
            for key, value in model.backbone.state_dict().items()}
