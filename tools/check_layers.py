"""Imports only go down: fails on an import of a level above the importer's own.

Run:  python tools/check_layers.py [package folder]
The levels are those of docs/architecture.md. Only the package's `__init__` may import
anything; a module that is not on a level yet has to be given one here.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "raptax"
LEVELS = [
    ["_core"],
    ["mods", "block_mask", "rope", "quant"],
    ["mod_compiler", "io"],
    ["kernels"],
    ["api"],
    ["kv_cache"],
    ["nn"],
    ["models"],
    ["generate"],
    ["compat"],
    ["info"],
    ["cli"],
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}


def imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """The line and full dotted name of each import; `package` resolves the dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            if base == PACKAGE:
                yield from ((node.lineno, f"{base}.{a.name}") for a in node.names)
            else:
                yield node.lineno, base


def complaints(root: Path) -> Iterator[str]:
    """One sentence per import that climbs, and per module that is on no level."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        here = parts[0]
        if parts == ("__init__",):
            continue
        if here not in LEVEL:
            yield f"{path}:1: {here} is on no level; give it one in {__file__}"
            continue
        tree = ast.parse(path.read_text())
        for line, name in imported(tree, (PACKAGE, *parts[:-1])):
            top, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if top != PACKAGE:
                continue
            if target not in LEVEL:
                yield f"{path}:{line}: {here} imports {name}, which is on no level"
            elif LEVEL[target] > LEVEL[here]:
                yield (
                    f"{path}:{line}: {here} (level {LEVEL[here]}) imports {target} "
                    f"(level {LEVEL[target]}), a level above it"
                )


if __name__ == "__main__":
    default = Path(__file__).parents[1] / "src" / PACKAGE
    found = list(complaints(Path(*sys.argv[1:]) if sys.argv[1:] else default))
    print("\n".join(found) or "imports only go down")
    sys.exit(bool(found))
