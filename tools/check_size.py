"""Sizes stay small: long functions, long files and long parameter lists.

Run:  python tools/check_size.py [folder ...]
Nine functions in ten have at most 45 lines, every function at most 7 positional
parameters, every file at most 600 lines. Docstrings are not counted.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FUNCTION_LINES, LONG_SHARE, POSITIONAL, FILE_LINES = 45, 0.1, 7, 600
ROOT = Path(__file__).parents[1]

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = Function | ast.ClassDef | ast.Module


def span(node: ast.stmt) -> int:
    """Lines from the first to the last of `node`."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def docstring_lines(node: ast.AST) -> int:
    """Lines taken by docstrings inside `node`, its own included."""
    inside = [n for n in ast.walk(node) if isinstance(n, Documented)]
    return sum(span(n.body[0]) for n in inside if ast.get_docstring(n) is not None)


def positional(node: Function) -> int:
    """Parameters that may be passed by position, without ``self``."""
    names = [arg.arg for arg in node.args.posonlyargs + node.args.args]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def complaints(paths: list[Path]) -> Iterator[str]:
    """One sentence per budget that is exceeded."""
    total, long = 0, []
    for path in paths:
        text = path.read_text()
        lines = len(text.splitlines())
        if path.suffix == ".py":
            tree = ast.parse(text)
            lines -= docstring_lines(tree)
            for node in (n for n in ast.walk(tree) if isinstance(n, Function)):
                place = f"{path}:{node.lineno}: {node.name}"
                total += 1
                if (size := span(node) - docstring_lines(node)) > FUNCTION_LINES:
                    long.append(f"{place} has {size} lines, over {FUNCTION_LINES}")
                if (count := positional(node)) > POSITIONAL:
                    yield f"{place} has {count} positional parameters"
        if lines > FILE_LINES:
            yield f"{path}:1: {lines} lines, over {FILE_LINES}"
    print("\n".join(long) or f"no function has over {FUNCTION_LINES} lines")
    if len(long) > LONG_SHARE * total:
        yield f"{len(long)} of {total} functions are long; nine in ten should not be"


if __name__ == "__main__":
    folders = [Path(name) for name in sys.argv[1:]] or [ROOT / "src", ROOT / "csrc"]
    files = [p for f in folders for p in sorted(f.rglob("*"))]
    found = list(complaints([p for p in files if p.suffix in (".py", ".cc", ".h")]))
    print("\n".join(found) or "sizes are within budget")
    sys.exit(bool(found))
