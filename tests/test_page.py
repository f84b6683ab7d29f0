"""Commands that write a part of a page of the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import bounds, growth, page, run
from benchmarks.page import fill
from demo import needle
from faults import run as faults

ROOT = Path(page.__file__).parents[1]
WRITTEN = {
    "growth": growth.PAGE,
    "what bounds a step": bounds.PAGE,
    "table of make bench": run.PAGE,
    "figures of make needle": needle.PAGE,
    "what make faults found": faults.PAGE,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_documentation_has_a_place_for_each(name: str, tmp_path: Path) -> None:
    copy = tmp_path / "page.md"
    copy.write_text((ROOT / WRITTEN[name]).read_text(encoding="utf-8"), encoding="utf-8")
    fill(copy, name, "Figures.")
    assert f"<!-- {name} -->\n\nFigures.\n\n<!-- end of {name} -->" in copy.read_text(encoding="utf-8")


def test_the_part_between_the_marks_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- rows -->\nold\n<!-- end of rows -->\n\nLast words.\n")
    fill(page, "rows", "new")
    fill(page, "rows", "newer")
    assert page.read_text() == "# Title\n\n<!-- rows -->\n\nnewer\n\n<!-- end of rows -->\n\nLast words.\n"


def test_a_page_without_the_marks_stays_as_it_is(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- end of rows --> <!-- rows -->")
    with pytest.raises(ValueError, match=r"page\.md: the lines <!-- rows --> and <!-- end of rows -->"):
        fill(page, "rows", "new")
    assert page.read_text() == "<!-- end of rows --> <!-- rows -->"
