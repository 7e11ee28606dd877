"""Documents: links lead somewhere, commands have their flags, the quick start runs."""
import contextlib
import io
import re
import runpy
import shlex
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def fenced_blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    blocks = FENCED.findall(page.read_text(encoding="utf-8"))
    return [text for name, text in blocks if name == language]


def heading_anchors(page: Path) -> set[str]:
    """The anchors that a Markdown viewer gives to the headings of a page."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in heading_anchors(target), link


def test_readme_is_at_most_200_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@cache
def help_text(script: str) -> str:
    """What `python SCRIPT --help` prints."""
    output = io.StringIO()
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output),
          pytest.raises(SystemExit)):
        patch.setattr("sys.argv", [script, "--help"])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return output.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_flags_that_they_are_shown_with(page):
    for block in fenced_blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            script = next((word for word in words if word.endswith(".py")), None)
            if script is None:
                continue
            assert (ROOT / script).is_file(), line
            flags = [word for word in words[words.index(script):] if word.startswith("--")]
            unknown = [flag for flag in flags if not re.search(rf"{flag}\b", help_text(script))]
            assert not unknown, line


def test_quick_start_of_readme_runs_and_prints_what_it_states(monkeypatch):
    page = ROOT / "README.md"
    [program] = fenced_blocks(page, "python")
    stated = next(text for text in fenced_blocks(page, "text")
                  if text.startswith("facesets/samples/"))
    monkeypatch.chdir(ROOT)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(program, "README.md", "exec"), {})
    # The third line holds probabilities, which may differ by the number format of the machine.
    assert output.getvalue().splitlines()[:2] == stated.splitlines()[:2]
