"""The documents are up to date, their links lead somewhere, and the options in them exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from prunus.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
COMMANDS = re.compile(r"^(?:\$ )?(?:torchrun .* -m )?prunus (.+?)(?:\s#.*)?$", re.MULTILINE)
LINKS = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


def test_generated_parts_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "docs.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for target in LINKS.findall(prose):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_shown_commands_have_the_options_they_use(page: Path) -> None:
    known = get_command(app).commands  # type: ignore[attr-defined]
    for block in re.findall(r"```shell\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        for line in COMMANDS.findall(block.replace("\\\n", " ")):
            command, *words = shlex.split(line)
            if command.startswith("-"):
                continue
            options = {name for parameter in known[command].params for name in parameter.opts} | {"--help"}
            assert not {word for word in words if word.startswith("--")} - options, line


def test_the_file_map_of_the_readme_names_what_exists() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    map_ = text.partition("## What lies where")[2].partition("```\n")[2].partition("```")[0]
    above = ROOT
    for line in map_.splitlines():
        names = [name.rstrip(",").rstrip("/") for name in re.split(r"\s{2,}", line.strip())[0].split()]
        folder = above if line.startswith("  ") else ROOT
        for name in names:
            assert list(folder.glob(name)), line
        above = folder if line.startswith("  ") else ROOT / names[0]


def test_every_method_and_allocation_has_a_page() -> None:
    from prunus.allocations import ALLOCATIONS
    from prunus.methods import ELEMENTWISE, SHAPES

    assert {page.stem for page in (ROOT / "docs" / "methods").glob("*.md")} == set(ELEMENTWISE)
    shapes = "".join((ROOT / "docs" / page).read_text("utf-8") for page in ("widths-and-depth.md", "lowrank.md"))
    assert set(re.findall(r"^### (\S+)$", shapes, re.MULTILINE)) == set(SHAPES)
    assert {page.stem for page in (ROOT / "docs" / "allocations").glob("*.md")} == set(ALLOCATIONS)
