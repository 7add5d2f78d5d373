"""The README: its Python blocks run, in order, in one namespace, and leave out no call."""

import contextlib
import doctest
import io
import re
from pathlib import Path

import pytest

import kvstore

TOP = Path(__file__).parents[2]
README = (TOP / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_every_python_block_does_what_it_says():
    names = {"__name__": "readme"}
    runner = doctest.DocTestRunner(
        optionflags=doctest.ELLIPSIS | doctest.REPORT_NDIFF, verbose=False
    )
    report = io.StringIO()
    for number, block in enumerate(BLOCKS):
        if ">>>" in block:
            test = doctest.DocTestParser().get_doctest(block, {}, f"block {number}", None, 0)
            test.globs = names
            runner.run(test, out=report.write, clear_globs=False)
        else:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(block, f"README block {number}", "exec"), names)
            assert f"It prints `{printed.getvalue().strip()}`" in README
    names.clear()
    assert runner.summarize(verbose=False).failed == 0, report.getvalue()


@pytest.mark.parametrize(
    "subject", [kvstore.KVStore, kvstore.Handle, kvstore.NDArray, kvstore.RowSparse]
)
def test_every_call_has_an_example(subject):
    code = "\n".join(BLOCKS)
    calls = {name for name in dir(subject) if not name.startswith("_")}
    assert {name for name in calls if not re.search(rf"\.{name}\b", code)} == set()


def test_every_public_name_of_the_package_is_mentioned():
    names = set(kvstore.__all__) - {"__version__"}
    assert {name for name in names if not re.search(rf"\b{name}\b", README)} == set()


def test_the_table_of_checks_is_that_of_the_runner():
    runner = (TOP / "tests" / "run.py").read_text(encoding="utf-8")
    habits = re.search(r"^HABITS = \((.*?)\)$", runner, re.MULTILINE | re.DOTALL)[1]
    checks = README.partition("## Checks")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", checks, re.M)) == set(re.findall(r"\w+", habits))


def test_every_file_that_is_named_exists():
    linked = re.findall(r"\]\(([^)#:]+)\)", README)
    quoted = re.findall(r"`((?:src|kvstore|tests|benchmarks|\.ci)/[\w./]*)`", README)
    assert linked and quoted
    for path in [*linked, *quoted]:
        assert (TOP / path).exists(), path


def test_the_reading_order_names_files_and_functions_that_exist():
    source = TOP / "src"
    rows = re.findall(r"^\| \d+ \|(.*)\|.*\|(.*)\|$", (source / "README.md").read_text(), re.M)
    assert len(rows) > 10
    for files, functions in rows:
        text = "".join((source / f).read_text() for f in re.findall(r"\]\(([\w./]+)\)", files))
        for function in re.findall(r"`(\w+)`", functions):
            assert re.search(rf"\b{function}\(", text), f"{function} is not in {files}"
