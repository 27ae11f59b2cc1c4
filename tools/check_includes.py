"""Includes of csrc/ only go down its folders: fails on one that goes up.

Run:  python tools/check_includes.py [folder]
The order is that of csrc/README.md. Tests may include anything. Paths start at csrc/.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDERS = [
    ["api"],
    ["runtime"],
    ["simd"],
    ["gemm"],
    ["attention", "linear"],
    ["targets", "ffi"],
    ["tests"],
]
FLOOR = {name: number for number, names in enumerate(FOLDERS) for name in names}
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"')
SUFFIXES = (".h", ".inl", ".cc")


def complaints(root: Path) -> Iterator[str]:
    """One sentence per include that goes up or names no file of `root`."""
    for path in sorted(p for p in root.rglob("*") if p.suffix in SUFFIXES):
        here = path.relative_to(root).parts[0]
        if here not in FLOOR:
            yield f"{path}:1: {here} is none of the folders {', '.join(FLOOR)}"
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found = INCLUDE.match(line)
            if found is None or found[1].startswith("xla/"):
                continue
            there, place = found[1].split("/")[0], f"{path}:{number}: {here}"
            if not (root / found[1]).is_file():
                yield f"{place} includes {found[1]}, which is no path below {root.name}/"
            elif FLOOR[there] > FLOOR[here]:
                yield f"{place} includes {found[1]}, of a folder above it"
            elif FLOOR[there] == FLOOR[here] and there != here:
                yield f"{place} includes {found[1]}, of a folder beside it"
            elif found[1].endswith(".cc"):
                yield f"{place} includes {found[1]}, which is compiled by itself"


if __name__ == "__main__":
    default = Path(__file__).parents[1] / "csrc"
    found = list(complaints(Path(*sys.argv[1:]) if sys.argv[1:] else default))
    print("\n".join(found) or "includes only go down")
    sys.exit(bool(found))
