"""Every link on the pages has a target, and docs/from-the-lecture.md has a row for every § and erratum."""

import ast
import functools
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")

# The lecture's blocks, counted from 0: 0 is the title, 1 an introduction, and 4 and 5 make one statement.
SECTIONS = ["2", "3", "4–5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15"]
ERRATA = ["1", "2", "3", "4", "5", "6", "7", "8"]


@functools.cache
def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links():
    return [(page.name, *link) for page in PAGES for link in LINK.findall(prose(page))]


@pytest.mark.parametrize(("page", "text", "target"), links())
def test_link(page, text, target):
    assert "://" not in target, "nothing here needs the network"
    path, _, anchor = target.partition("#")
    file = (DOCS / path).resolve() if path else DOCS / page
    assert file.is_file(), target
    assert file.is_relative_to(ROOT)
    if anchor:
        assert anchor in anchors(file)


def test_every_figure_is_shown():
    shown = {target for _, _, target in links() if target.startswith("figures/")}
    assert shown == {f"figures/{file.name}" for file in (DOCS / "figures").iterdir()}


# ---------------------------------------------------------------------------------------------------------------------
# The two tables of docs/from-the-lecture.md


def table(heading: str) -> list[dict[str, str]]:
    (text,) = re.findall(
        rf"^## {heading}$(.*?)(?=^## |\Z)", prose(DOCS / "from-the-lecture.md"), re.MULTILINE | re.DOTALL
    )
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head, _, *rows = cells
    return [dict(zip(head, row, strict=True)) for row in rows]


STATEMENTS, ERRATUM = table("Statements"), table("Errata")
ROWS = [pytest.param(row, id=f"section {row['§'].replace('–', '-')}") for row in STATEMENTS]
ROWS += [pytest.param(row, id=f"erratum {row['erratum']}") for row in ERRATUM]


def test_every_section_and_every_erratum_has_its_row_in_the_lectures_order():
    assert [row["§"] for row in STATEMENTS] == SECTIONS
    assert [row["erratum"] for row in ERRATUM] == ERRATA


def linked(cell: str) -> list[tuple[str, Path]]:
    """Return the names and files linked in a cell, which must contain only links."""
    links = LINK.findall(cell)
    assert links, "an empty cell"
    assert not LINK.sub("", cell).strip(" ,"), f"not a link: {cell}"
    return [(name.strip("`"), (DOCS / target).resolve()) for name, target in links]


def defined(file: Path) -> set[str]:
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("row", ROWS)
def test_linked_functions_exist(row):
    for name, file in linked(row["function"]):
        module, _, attribute = name.rpartition(".")
        assert callable(getattr(importlib.import_module(module), attribute)), name
        assert file.is_relative_to(ROOT / "jaxcnn"), name
        assert attribute in defined(file), f"{name} is not in {file.relative_to(ROOT)}"


@pytest.mark.parametrize("row", ROWS)
def test_experiments_are_scripts_that_run_as_modules(row):
    for name, file in linked(row["experiment"]):
        assert file == ROOT / "experiments" / f"{name.replace('.', '/')}.py", name
        source = file.read_text(encoding="utf-8")
        assert '__name__ == "__main__"' in source or "# %%" in source, f"{name} does nothing when it is run"


@pytest.mark.parametrize("row", ROWS)
def test_linked_tests_exist(row):
    for name, file in linked(row["test"]):
        assert file.is_relative_to(ROOT / "tests"), name
        assert name in defined(file), f"{name} is not in {file.relative_to(ROOT)}"


# ---------------------------------------------------------------------------------------------------------------------
# The § and errata that the scripts of experiments/lecture state


def stated(script: Path) -> tuple[set[int], set[int]]:
    """Return the sections and errata in a script's STATEMENT."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Statement":
            keywords = {k.arg: k.value for k in node.keywords}
            sections = numbers(ast.literal_eval(keywords["section"]))
            errata = keywords.get("errata")
            return sections, {ast.literal_eval(e.elts[0]) for e in errata.elts} if errata else set()
    raise AssertionError(f"{script} has no STATEMENT")


def numbers(text: str) -> set[int]:
    """Return the numbers, {4, 5} for "4–5" and {6, 8} for "6, 8"."""
    ranges = [part.split("–") for part in text.split(", ")]
    return {n for ends in ranges for n in range(int(ends[0]), int(ends[-1]) + 1)}


@pytest.mark.parametrize("script", sorted((ROOT / "experiments" / "lecture").glob("s[0-9]*.py")), ids=lambda s: s.stem)
def test_every_script_of_the_lecture_is_in_the_rows_of_its_sections(script):
    sections, errata = stated(script)
    for row in STATEMENTS:
        here = script in [file for _, file in linked(row["experiment"])]
        assert here == bool(numbers(row["§"]) & sections), f"§{row['§']}"
    for row in ERRATUM:
        here = script in [file for _, file in linked(row["experiment"])]
        assert here == (int(row["erratum"]) in errata), f"erratum {row['erratum']}"
