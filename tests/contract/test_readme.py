"""README and examples say only what is so: paths exist, commands parse, configurations load."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from litespark.cli.main import parse
from litespark.config import load_config, validate

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "examples").rglob("README.md"))]
# Made by a run or by the user, not part of the checkout.
MADE_LATER = (".bin/", "runs/", "data/", "tensorboard/", "checkpoints/", "slimpajama/", ".venv")


def code_spans(document: Path) -> list[str]:
    prose = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def commands(document: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", document.read_text(), flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


ALL_COMMANDS = [(document, line) for document in DOCUMENTS for line in commands(document)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_exist(document):
    spans = [span for span in code_spans(document) if re.fullmatch(r"[\w.\-]+(/[\w.\-]*)+", span)]
    spans = [span for span in spans if not span.startswith(MADE_LATER)]
    for span in spans:
        found = (ROOT / span).exists() or (document.parent / span).exists()
        assert found, f"{document.relative_to(ROOT)} names {span}, which is not there"
    if document.name == "README.md" and document.parent == ROOT:
        assert len(spans) > 20, "the tour names its files"


@pytest.mark.parametrize(("document", "line"), ALL_COMMANDS, ids=lambda value: str(value)[-60:])
def test_commands_parse(document, line):
    words = shlex.split(line)
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), f"no target {words[1]}"
    elif words[0] == "litespark":
        parse(words[1:])
    elif words[0] == "torchrun":
        parse(words[words.index("litespark") + 1 :])
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
        shown = subprocess.run(
            [sys.executable, words[1], "--help"], capture_output=True, text=True, cwd=ROOT
        ).stdout
        for option in (word for word in words[2:] if word.startswith("--")):
            assert option in shown, f"{words[1]} has no {option}"
    else:
        raise AssertionError(f"{document}: do not know how to check: {line}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_figure_is_left_to_fill_in(document):
    assert not re.search(r"@[A-Z_]+@|TODO|TBD|XXX", document.read_text())


def test_the_two_commands_stand_first():
    assert commands(ROOT / "README.md")[:2] == ["make quickstart", "make test"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda path: path.name
)
def test_example_configurations_are_valid(path):
    config = load_config(path)
    parallel = config.parallel
    ranks = parallel.tensor * parallel.pipeline * parallel.context
    assert validate(config, ranks) == []
    assert validate(config, 2 * ranks) == []


@pytest.mark.parametrize("size", ["full", "short"])
def test_the_quick_starts_layouts_are_valid(size, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "quickstart"))
    import quickstart

    overrides = quickstart.SIZES[size].overrides
    for layout in (quickstart.FIRST_LAYOUT, quickstart.SECOND_LAYOUT):
        config = load_config(ROOT / quickstart.CONFIG, [*layout, *overrides])
        assert validate(config, 4) == []
