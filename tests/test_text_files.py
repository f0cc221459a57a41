"""Text files are UTF-8 whatever the locale: every read and write says so."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = ("tvkernels", "pipelines", "benchmarks", "tests")
TEXT_MODE = re.compile("[rwxat+]+")


def silent(call: ast.Call) -> bool:
    """Whether a call opens a text file in the encoding of the locale."""
    name = getattr(call.func, "attr", getattr(call.func, "id", None))
    if name not in ("read_text", "write_text", "open"):
        return False
    if any(keyword.arg in ("encoding", None) for keyword in call.keywords):
        return False
    if name != "open":
        return name == "write_text" or not call.args
    # Path.open begins with the mode, the builtin with the file; av.open and others match neither.
    at = 0 if isinstance(call.func, ast.Attribute) else 1
    mode = call.args[at] if len(call.args) > at else ast.Constant("r")
    return isinstance(mode, ast.Constant) and bool(TEXT_MODE.fullmatch(str(mode.value)))


def test_every_text_file_is_opened_as_utf_8():
    files = [ROOT / "setup.py", *(file for p in PLACES for file in (ROOT / p).rglob("*.py"))]
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and silent(node)
    ]
    assert len(files) > 200
    assert not found, 'encoding="utf-8" is missing'


def test_the_search_knows_the_forms():
    bad = (
        "p.read_text()",
        'p.write_text("x")',
        "open(p)",
        'open(p, "w")',
        'p.open("a")',
        "p.open()",
    )
    good = (
        'p.read_text(encoding="utf-8")', 'open(p, "rb")', 'p.open("wb")', 'av.open(p, "w")',
        "image.open(p)", "open(p, **how)",
    )  # fmt: skip
    assert [silent(ast.parse(text).body[0].value) for text in bad] == [True] * len(bad)
    assert [silent(ast.parse(text).body[0].value) for text in good] == [False] * len(good)
