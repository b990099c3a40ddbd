"""Keep same-named definitions the same: two functions or classes of one name in algos/ have one text.

    python tests/shared.py                          # list the definitions that differ between files
    python tests/shared.py algos/ppo.py             # copy all shared definitions of ppo.py into the other files
    python tests/shared.py algos/ppo.py gae Run     # copy these two

A file is shared-nothing: it can be copied out of the repository and changed. The price is that a fix has to reach
every file that repeats the fixed part, and this is what makes that one command.
"""

import ast
import sys
from pathlib import Path

ALGOS = Path(__file__).resolve().parent.parent / "algos"

MAY_DIFFER = {  # what belongs to the algorithm or to the family of environments
    "Args",
    "Agent",
    "Critics",
    "a2c_loss",
    "log_prob_and_entropy",
    "ppo_loss",
    "start_envs",
    "to_tensor",
    "frame",
    "train",
}


def definitions(path: Path) -> dict[str, tuple[int, int, str]]:
    """Top-level functions and classes of a file: name -> first line, line after the last, text."""
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            found[node.name] = (first, node.end_lineno, "".join(lines[first : node.end_lineno]))
    return found


def drift(folder: Path = ALGOS) -> list[str]:
    """One line for each definition that differs from the one of the same name in an earlier file."""
    seen, lines = {}, []
    for path in sorted(folder.glob("*.py")):
        for name, (_, _, text) in definitions(path).items():
            if name not in MAY_DIFFER:
                first = seen.setdefault(name, (path.name, text))
                if first[1] != text:
                    lines.append(f"{name}: {path.name} differs from {first[0]}")
    return lines


def copy(source: Path, names: list[str], folder: Path = ALGOS) -> list[str]:
    """Copy definitions of `source` over those of the same name in the other files; returns what was changed."""
    ours, changed = definitions(source), []
    for name in names or ours:
        if name not in ours:
            sys.exit(f"error: {source} has no top-level definition {name}")
        for path in sorted(folder.glob("*.py")):
            theirs = definitions(path)
            if name in theirs and name not in MAY_DIFFER and theirs[name][2] != ours[name][2]:
                lines = path.read_text().splitlines(keepends=True)
                lines[theirs[name][0] : theirs[name][1]] = [ours[name][2]]
                path.write_text("".join(lines))
                changed.append(f"{name}: {source.name} -> {path.name}")
    return changed


if __name__ == "__main__":
    if any(word.startswith("-") for word in sys.argv[1:]):
        print(__doc__)
    elif len(sys.argv) == 1:
        print("\n".join(drift()) or "no drift")
    else:
        print("\n".join(copy(Path(sys.argv[1]).resolve(), sys.argv[2:])) or "nothing to copy")
