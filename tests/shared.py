"""Keep what the scripts in algos/ share the same: the machinery, from the banner "The run" to the end of each file.

python tests/shared.py                  # list what differs
python tests/shared.py algos/ppo.py     # copy the machinery of ppo.py into the other scripts
"""

import ast
import sys
from collections import Counter
from pathlib import Path

ALGOS = Path(__file__).resolve().parent.parent / "algos"
BANNER = "\n# ------------------- The run: "
MAY_DIFFER = set("Args Agent Adapter Critics ReplayBuffer PrioritizedBuffer mlp make_envs train".split())
MAY_DIFFER |= set("a2c_loss ppo_loss critic_loss actor_loss".split())


def split(path: Path) -> tuple[str, str]:
    """The reader's half of a script and its machinery, which begins with the banner."""
    own, banner, rest = path.read_text().partition(BANNER)
    return own, banner + rest


def drift(folder: Path = ALGOS) -> list[str]:
    """Scripts whose machinery is not that of most, and definitions that differ from those of the same name."""
    scripts = {path: split(path) for path in sorted(folder.glob("*.py"))}
    usual = Counter(machinery for _, machinery in scripts.values()).most_common(1)[0][0]
    found, first = [path.name for path, (_, machinery) in scripts.items() if machinery != usual], {}
    for path, (own, _) in scripts.items():
        for node in ast.parse(own).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in MAY_DIFFER:
                name, text = first.setdefault(node.name, (path.name, ast.get_source_segment(own, node)))
                if text != ast.get_source_segment(own, node):
                    found.append(f"{node.name} in {path.name} and {name}")
    return found


def copy(source: Path) -> list[str]:
    """Copy the machinery of a script into the others of its folder that have one. Returns the names of those."""
    ours, changed = split(source)[1], []
    if not ours:
        sys.exit(f'error: {source} has no banner "The run"')
    for path in sorted(source.parent.glob("*.py")):
        own, machinery = split(path)
        if machinery and machinery != ours:
            path.write_text(own + ours)
            changed.append(path.name)
    return changed


if __name__ == "__main__":
    print("\n".join(copy(Path(sys.argv[1])) if sys.argv[1:] else drift()) or "nothing differs")
