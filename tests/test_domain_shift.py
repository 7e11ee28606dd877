"""Augmentation against domain shift, balanced sampling, outlier exposure and frozen layers."""
import pytest
import torch
import torch.nn.functional as F

from models.faces.align import TEMPLATE
from models.faces.classifier import FaceClassifier, FaceSpec
from models.training import domain_shift
from models.training.crops import Crops
from models.training.distillation import TeacherError, mix_in_soft_targets
from models.training.outliers import OUTLIER, add_outliers
from models.training.process import Process
from models.training.sampling import class_and_gender, epoch_rows, group_weights
from models.training.state import freeze_layers

CPU = Process(0, 1, torch.device("cpu"))


def seeded(seed: int) -> torch.Generator:
    """A generator."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def views() -> torch.Tensor:
    """Smooth colour pictures (16, 3, 48, 48) float32."""
    coarse = 255 * torch.rand(16, 3, 6, 6, generator=seeded(0))
    return F.interpolate(coarse, size=48, mode="bicubic").clamp(0, 255)


def make_crops(labels: torch.Tensor, n_targets: int = 2) -> Crops:
    """Black crops of two classes."""
    targets = torch.zeros(len(labels), n_targets)
    targets[:, :2] = F.one_hot(labels, 2)
    return Crops(torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8), labels, targets,
                 [f"/{row}" for row in range(len(labels))])


@pytest.mark.parametrize("transform", [transform for transform, _ in domain_shift.SHIFT_TRANSFORMS])
def test_transforms_keep_shape_and_range_and_follow_the_seed(views, transform):
    first, again = (transform(views.clone(), seeded(5)) for _ in range(2))
    assert torch.equal(first, again) and first.shape == views.shape
    assert first.min() >= -0.01 and first.max() <= 255.01 and (first - views).abs().mean() > 0.5


def test_strength_is_the_share_that_changes(views):
    assert torch.equal(domain_shift.shift_views(views.clone(), 0.0, seeded(1)), views)
    many = views.repeat(16, 1, 1, 1)
    is_same = (domain_shift.shift_views(many.clone(), 1.0, seeded(1)) == many).flatten(1).all(1)
    expected = 1.0
    for _, share in domain_shift.SHIFT_TRANSFORMS:
        expected *= 1 - share
    assert is_same.float().mean().item() == pytest.approx(expected, abs=0.09)
    assert len(domain_shift.shift_views(views[:0], 1.0, seeded(1))) == 0


def test_worse_compression_changes_more_and_grey_is_luma(views):
    fine, coarse = (domain_shift.jpeg(views, [quality] * 16) for quality in (95, 20))
    assert (fine - views).abs().mean() < (coarse - views).abs().mean()
    grey = domain_shift.greyscale(views)
    luma = 0.299 * views[:, 0] + 0.587 * views[:, 1] + 0.114 * views[:, 2]
    assert torch.allclose(grey, luma[:, None].expand_as(grey), atol=1e-3)


def test_half_of_a_mixture_stays(views):
    pixels = views.repeat(16, 1, 1, 1).to(torch.uint8)
    mixed = domain_shift.mixture_views(pixels, 3)
    is_same = (mixed == pixels).flatten(1).all(1)
    assert mixed.dtype == torch.uint8 and 0.4 < is_same.float().mean() < 0.6
    assert torch.equal(mixed, domain_shift.mixture_views(pixels, 3))


def test_balance_equals_groups_and_outliers_have_their_share():
    labels = torch.tensor([0] * 90 + [1] * 10)
    crops = make_crops(labels)
    crops.weights = group_weights(class_and_gender(crops, 2), 1.0)
    assert crops.weights[:90].sum().item() == pytest.approx(0.5)
    assert group_weights(labels, 0.0)[0].item() == pytest.approx(0.01)
    outliers = make_crops(torch.zeros(4, dtype=torch.int64))
    outliers.labels[:] = OUTLIER
    together = add_outliers(crops, outliers, 0.25)
    rows = epoch_rows(104, 0, 1, CPU, together.weights, 20000)
    assert len(rows) == 20000
    assert (together.labels[rows] == OUTLIER).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert len(epoch_rows(104, 0, 1, CPU, together.weights, 50).unique()) == 50
    assert len(epoch_rows(104, 0, 1, CPU, together.weights).unique()) == 104


def test_classes_are_balanced_by_gender_where_it_is_known():
    crops = make_crops(torch.tensor([0, 0, 0, 1]), n_targets=2 + 9 + 2)
    crops.targets[1, -1] = crops.targets[3, -2] = 1
    groups = class_and_gender(crops, 2)
    assert groups[0] == groups[2] and len(groups.unique()) == 3


@pytest.mark.parametrize(("missing", "kept"), [("label", 2), ("skip", 1)])
def test_pictures_that_a_table_lacks(missing, kept):
    table = {"/1": [0.5, 0.5], "/0": []}
    crops = mix_in_soft_targets([("t.csv", table)], make_crops(torch.tensor([0, 1])), 0.5, CPU,
                                missing)
    assert crops.targets.tolist() == [[1, 0], [0.25, 0.75]][-kept:]
    with pytest.raises(TeacherError, match="no probabilities for /0"):
        mix_in_soft_targets([("t.csv", table)], make_crops(torch.tensor([0, 1])), 0.5, CPU)


def test_frozen_layers_keep_weights_and_statistics():
    spec = FaceSpec(("a", "b"), TEMPLATE, (16, 30, 96, 110), 32)
    model = FaceClassifier(spec).train()
    freeze_layers(model, "")
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    freeze_layers(model, "layer2")
    model(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)).sum().backward()
    frozen = ("conv1", "bn1", "layer1", "layer2")
    for key, value in model.backbone.state_dict().items():
        is_statistic = "running" in key or "num_batches" in key
        assert torch.equal(value, before[key]) != (is_statistic and not key.startswith(frozen))
    for name, parameter in model.backbone.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen)
