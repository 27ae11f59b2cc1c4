"""What the documentation shows is what happens.

Python blocks of README.md and docs/*.md run from top to bottom in one namespace per
file. A block fenced as ``python slow`` only runs with the slow tests; any other info
string, such as ``text``, does not run. Doctests run as they do everywhere.
"""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

import raptax

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("README.md"), *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^```(python(?: slow)?)\n(.*?)^```$", re.M | re.S)
PACKAGE = Path(raptax.__file__).parent
MODULES = [p for p in sorted(PACKAGE.rglob("*.py")) if ">>>" in p.read_text()]


def run_blocks(path: Path, fences: set[str]) -> int:
    text, ran = path.read_text(), 0
    namespace = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        if block[1] in fences:
            # Blank lines first, so that a traceback names the line in the document.
            above = text.count("\n", 0, block.start(2))
            exec(compile("\n" * above + block[2], str(path), "exec"), namespace)
            ran += 1
    return ran


def name(path: Path) -> str:
    return path.relative_to(ROOT if ROOT in path.parents else PACKAGE).as_posix()


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_document(path):
    run_blocks(path, {"python"})


@pytest.mark.slow
@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_document_in_full(path):
    run_blocks(path, {"python", "python slow"})


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_doctests(path):
    # Read from the source: doctest overlooks functions that a decorator has wrapped.
    dotted = ".".join(("raptax", *path.relative_to(PACKAGE).with_suffix("").parts))
    module = importlib.import_module(dotted.removesuffix(".__init__"))
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    documented = ast.AsyncFunctionDef | ast.FunctionDef | ast.ClassDef | ast.Module
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, documented) and (said := ast.get_docstring(node)):
            title, line = getattr(node, "name", dotted), node.body[0].lineno
            runner.run(
                parser.get_doctest(said, dict(vars(module)), title, str(path), line)
            )
    assert runner.summarize().attempted > 0
    assert runner.failures == 0


def test_a_wrong_document_fails(tmp_path):
    path = tmp_path / "wrong.md"
    path.write_text("# Wrong\n\n```python\nx = 1\n```\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run_blocks(path, {"python"})
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno) == (path, 6)


def test_blocks_that_are_not_python_do_not_run(tmp_path):
    path = tmp_path / "text.md"
    path.write_text("```text\nnot python\n```\n```python slow\nx = 1\n```\n")
    assert run_blocks(path, {"python"}) == 0
    assert run_blocks(path, {"python", "python slow"}) == 1
