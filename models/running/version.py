"""The version of the project, whose one source is pyproject.toml."""
import importlib.metadata
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def read_version() -> str:
    """Version in the pyproject.toml of this checkout, else the version of the installed package."""
    if PYPROJECT.is_file():
        return tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["version"]
    return importlib.metadata.version("face-group-labels")
