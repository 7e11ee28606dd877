"""Face detection, alignment, classification and statistics, used by the commands and from Python.

    from models import label_photos, load_checkpoint

These names are imported on first use, so that `import models.<module>` loads nothing else.
"""
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.faces.checkpoint import load_checkpoint as load_checkpoint
    from models.faces.labelling import label_photos as label_photos

MODULE_OF = {"label_photos": "models.faces.labelling", "load_checkpoint": "models.faces.checkpoint"}
__all__ = ["label_photos", "load_checkpoint"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("models.running.version").read_version()
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
