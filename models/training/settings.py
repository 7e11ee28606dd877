"""Hyperparameters of a training run, and recipes: named sets of their values."""
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class TrainingSettings:
    """All hyperparameters of a training run; the default values are the recipe `default`.

    Each field is a flag of train.py (models/training/flags.py). The default values were chosen on
    validation pictures; visualizations/experiments.csv lists what else was tried.
    """
    window: tuple[float, float, float, float] = (16, 30, 96, 110)   # square of the template
    # (share of the epochs up to which it is used, pixels); the last one is that of the checkpoint
    input_sizes: tuple[tuple[float, int], ...] = ((0.2, 72), (0.5, 88), (1.0, 104))
    epochs: int = 30
    batch_size: int = 64            # pictures per process and step
    lr: float = 0.001               # peak learning rate
    schedule: str = "cosine"        # 'cosine' over all steps, or 'step': a tenth every 20 epochs
    warmup_epochs: float = 2        # linear learning-rate warm-up
    weight_decay: float = 0.05      # decoupled (AdamW); weights of two or more dimensions only
    label_smoothing: float = 0.05
    mixup: float = 0.3              # share of the batches that are mixed, with Beta(0.4, 0.4)
    ema_decay: float = 0.998        # per step; 0 validates and saves the weights without averaging
    aux_weight: float = 0.2         # loss weight of the auxiliary heads; 0: no such heads
    augment: bool = True            # geometry, colour, blur, erasing; False: random shift and flip
    shift: float = 0.0              # strength of the domain-shift augmentation; 1: as designed
    calibrate_on: str = "clean"     # 'clean' validation pictures, or a 'mixture' with shifted ones
    choose: str = "best"            # the 'best' epoch on validation, or the 'last' one
    patience: int = 20              # early stopping: epochs without a lower validation loss
    teacher_share: float = 0.7      # share of the teachers' soft targets in each target
    teacher_missing: str = "error"  # pictures a table lacks: 'error', learn the 'label', or 'skip'
    epoch_size: int = 0             # pictures sampled per epoch; 0: every picture once
    balance: float = 0.0            # of sampled classes and genders: 0 as they are, 1 equal
    outlier_share: float = 0.08     # of sampled pictures, of --outliers
    freeze: str = ""                # last frozen layer of the backbone; '': none
    val_share: float = 0.06         # hold-out share of a set that has no val folder
    seed: int = 2023

    @property
    def input_size(self) -> int:
        """Input size of the checkpoint, in pixels."""
        return self.input_sizes[-1][1]

    def input_size_at(self, epoch: int) -> int:
        """Input size of an epoch, counted from 0."""
        return next((size for share, size in self.input_sizes[:-1]
                     if epoch < round(share * self.epochs)), self.input_size)


DEFAULT = TrainingSettings()
RECIPES = {
    "default": DEFAULT,
    # Fine-tuning at a larger input size, from the weights of a first run (--init).
    "refine": replace(DEFAULT, input_sizes=((0.34, 104), (1.0, 128)), epochs=12, lr=0.0005,
                      warmup_epochs=1, aux_weight=0.0),
    # Fine-tuning (--init) against domain shift.
    "robust": replace(DEFAULT, input_sizes=((1.0, 104),), epochs=6, lr=0.0003, warmup_epochs=0.2,
                      mixup=0.2, ema_decay=0.995, aux_weight=0.0, shift=1.0,
                      calibrate_on="mixture"),
    # EthnicityRecognition-UTKFaces: chip at 128, random crop of 104 and flip, Adam, StepLR(20).
    "published": replace(DEFAULT, window=(20, 34, 93.2, 107.2), input_sizes=((1.0, 104),),
                         schedule="step", warmup_epochs=0, weight_decay=0.0, label_smoothing=0.0,
                         mixup=0.0, ema_decay=0.0, aux_weight=0.0, augment=False, choose="last"),
}
