"""No code of an instruction set leaks: fails on weak functions outside its namespace.

Run:  python tools/check_symbols.py NM ARCHIVE
NM is nm's path, ARCHIVE the static library of csrc/targets. The linker keeps one copy of
a weak function for all objects; one compiled with AVX-512 would end a process on other
machines. Weak data has no instructions and may be shared. CMake runs this where
RAPTAX_WERROR is ON.
"""

import re
import subprocess
import sys
from collections.abc import Iterator

TARGETS = ("generic", "avx2", "avx512", "avx512bf16", "amx")
OBJECT = re.compile(r"(?:.*[:/])?(\w+)\.cc\.o(?:bj)?:$")
WEAK = re.compile(r"[0-9a-f]* +W (.*)$")


def complaints(listing: str) -> Iterator[str]:
    """One sentence per weak function of a target that is not in its namespace."""
    seen, here = set(), ""
    for line in listing.splitlines():
        if found := OBJECT.match(line):
            here = found[1]
            seen.add(here)
        elif here not in TARGETS or (weak := WEAK.match(line)) is None:
            continue
        elif f"raptax::{here}::" not in weak[1]:
            yield f"{here}.cc: {weak[1]} is a weak symbol outside raptax::{here}"
    if not seen & set(TARGETS):
        yield f"no object of {', '.join(TARGETS)} was given"


if __name__ == "__main__":
    nm, archive = sys.argv[1:]
    command = [nm, "-C", archive]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    problems = list(complaints(listing))
    print("\n".join(problems) or "no weak function leaves its instruction set")
    sys.exit(bool(problems))
