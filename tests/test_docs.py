"""The docs: links lead to files that are there, and to lines that hold what they name."""

import itertools
import re

import pytest
import tiny

PAGES = [tiny.ROOT / "README.md", tiny.ROOT / "CONTRIBUTING.md",
         *sorted((tiny.ROOT / "docs").glob("*.md"))]
_LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)?(?:#([^)\s]+))?\)")
_LINE = re.compile(r"L(\d+)")


def links(page):
    """(text, path, anchor) of the links to files of the project."""
    for text, target, anchor in _LINK.findall(page.read_text()):
        if target and "://" not in target:
            yield text, target, anchor


def lines_that_define(name: str, lines: list[str]) -> list[int]:
    """The numbers of the lines that define a name, or that call it where it is dotted."""
    pattern = rf"\b{re.escape(name)}\(" if "." in name else rf"(def|class) {re.escape(name)}\b"
    return [number for number, line in enumerate(lines, 1) if re.search(pattern, line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for text, target, _ in links(page):
        assert (page.parent / target).exists(), f"{page.name}: [{text}]({target})"


def test_the_walk_to_the_derivative_names_the_right_lines():
    page = tiny.ROOT / "docs" / "method.md"
    found = 0
    for text, target, anchor in links(page):
        line = _LINE.fullmatch(anchor)
        if not line:
            continue
        found += 1
        name = text.strip("`")
        lines = (page.parent / target).read_text().splitlines()
        right = lines_that_define(name, lines)
        assert int(line[1]) in right, f"[{text}]({target}#{anchor}): it stands on {right}"
    assert found >= 15


def test_the_tests_of_promises_are_there():
    page = (tiny.ROOT / "docs" / "reliability.md").read_text()
    cited = re.findall(r"([\w/]+\.py)(?:::(\w+))?", page)
    assert len(cited) > 50
    for file, test in cited:
        text = (tiny.ROOT / "tests" / file).read_text()
        assert f"def {test}(" in text or not test, f"{file} has no {test}"


def test_promises_say_when_they_are_checked():
    """A promise is always checked if a test of it is not slow."""
    found = 0
    for row in (tiny.ROOT / "docs" / "reliability.md").read_text().splitlines():
        tests = re.findall(r"([\w/]+\.py)::(\w+)", row)
        if tests and row.split("|")[3].strip().startswith("always"):
            found += 1
            assert any(not is_slow(*test) for test in tests), row
    assert found > 20


def is_slow(file: str, test: str) -> bool:
    lines = (tiny.ROOT / "tests" / file).read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith(f"def {test}("))
    above = itertools.takewhile(bool, reversed(lines[:place]))
    return "@pytest.mark.slow" in above
