"""docs/shapes.md's table of what loads where: every cell is tried here, on blocks cut from tests/assets/stories260k.

    python scripts/loads_table.py          write docs/shapes.md's table
    python scripts/loads_table.py --check  say whether it is up to date (runs everything again)

Needs llama-cpp-python for the last column.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "shapes.md"
BEGIN, END = "<!-- loads:begin -->", "<!-- loads:end -->"
sys.path.insert(0, str(ROOT / "tests"))

BIASES = {"self_attn.o_proj": 0.1, "mlp.down_proj": 0.1}
SHAPES: dict[str, tuple[list[int], list[int], dict[str, float]]] = {
    "narrower neurons, all blocks alike": ([4] * 5, [96] * 5, {}),
    "fewer heads, all alike, a number that divides the hidden size": ([2] * 5, [172] * 5, {}),
    "fewer heads, all alike, a number that does not": ([3] * 5, [172] * 5, {}),
    "all alike, with biases on o and down": ([2] * 5, [96] * 5, BIASES),
    "all alike, with biases, heads that do not divide": ([3] * 5, [96] * 5, BIASES),
    "neurons differ by block": ([4] * 5, [172, 128, 96, 64, 32], {}),
    "heads differ by block": ([4, 3, 2, 1, 4], [172] * 5, {}),
    "heads and neurons differ, with biases": ([4, 3, 2, 1, 4], [172, 128, 96, 64, 32], BIASES),
}


def main() -> None:
    """Write the table, or compare it."""
    if find_spec("llama_cpp") is None:
        raise SystemExit("This needs llama.cpp: pip install llama-cpp-python")
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    new = f"{head}{BEGIN}\n{table()}\n{END}{tail}"
    if "--check" in sys.argv and new != text:
        raise SystemExit("docs/shapes.md is out of date: python scripts/loads_table.py")
    PAGE.write_text(new, encoding="utf-8")


def table() -> str:
    """The table in Markdown."""
    lines = ["| shape | `--format hf` | `--format hf --portable` | `--format gguf` |", "|---|---|---|---|"]
    with TemporaryDirectory() as scratch:
        for number, (name, shape) in enumerate(SHAPES.items()):
            lines.append(f"| {name} | {' | '.join(_row(Path(scratch) / str(number), *shape))} |")
    return "\n".join(lines)


def _row(place: Path, groups: list[int], neurons: list[int], biases: dict[str, float]) -> list[str]:
    from shaped import STORIES, cut

    place.mkdir()
    source = cut(STORIES, place / "cut", groups, neurons, biases)
    return [
        _cell(source, place / "hf", _folder),
        _cell(source, place / "portable", _folder, portable=True),
        _cell(source, place / "out.gguf", _file, format="gguf"),
    ]


def _cell(source: Path, out: Path, words: Callable[[dict], str], **options: object) -> str:
    import prunus

    try:
        return words(prunus.export(source, out, **options))  # type: ignore[arg-type]
    except prunus.PrunusError as problem:
        return f"refused: {str(problem).partition('.')[0]}"


def _folder(result: dict) -> str:
    padded = next(
        (note.partition(": ")[2].partition(" more")[0] for note in result["notes"] if "filled up" in note), ""
    )
    words = f"`{result['class']}`"
    words += "" if result["stock"] else " and the modelling file in the folder"
    return f"{words}, {padded} more numbers (zeros)" if padded else words


def _file(result: dict) -> str:
    check = result["check"]
    return f"`{result['arch']}`, {check['equal']} of {check['tokens']} greedy tokens equal"


if __name__ == "__main__":
    main()
