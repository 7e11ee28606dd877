"""Auxiliary heads: age band and gender, learnt beside the classes and dropped after training."""
import bisect

import torch
from torch import Tensor, nn

from models.data.faceset import GENDERS, FaceSet, read_manifest
from models.faces.classifier import FaceClassifier

AGE_BANDS = (0, 5, 10, 18, 26, 34, 44, 56, 70)      # lower ends, years
AUX_OUTPUTS = (len(AGE_BANDS), len(GENDERS))        # of the two heads


def aux_targets(faces: FaceSet) -> Tensor:
    """One-hot age bands and genders (N, 9 + 2); zeros where manifest.csv has no value."""
    targets = torch.zeros(len(faces), sum(AUX_OUTPUTS))
    manifest = read_manifest(faces.root, faces.files)
    for row, file in enumerate(faces.files if manifest else ()):
        age, gender = manifest[file]["age"] or "", manifest[file]["gender"]
        if age.isdecimal():
            targets[row, bisect.bisect_right(AGE_BANDS, int(age)) - 1] = 1
        if gender in GENDERS:
            targets[row, len(AGE_BANDS) + int(gender)] = 1
    return targets


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
