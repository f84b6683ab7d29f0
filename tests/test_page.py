"""Commands that write a part of a page of the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import growth, page, roofline, table
from benchmarks.measure import Comparison
from benchmarks.page import fill, fill_or_add
from demo import needle
from faults import run as faults

ROOT = Path(page.__file__).parents[1]
WRITTEN = {
    "growth": growth.PAGE,
    "what a GPU's step moves": roofline.PAGE,
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


def test_a_new_part_goes_to_the_end_of_a_page_and_is_replaced_there(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n")
    fill_or_add(page, "rows", "old")
    fill_or_add(page, "more", "others")
    fill_or_add(page, "rows", "new")
    rows = "<!-- rows -->\n\nnew\n\n<!-- end of rows -->\n"
    assert page.read_text() == f"# Title\n\n{rows}\n<!-- more -->\n\nothers\n\n<!-- end of more -->\n"


def test_each_machine_has_its_own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(table, "PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text("# Speed\n")
    rows = [table.Row("a step", "theirs", Comparison([1.0, 1.0], [2.0, 2.0]), "fp32")]
    cpu = {"cpu": "Intel(R) Xeon(R) Processor", "cores": 2}
    table.write(rows, cpu, "make bench")
    table.write(rows, cpu | {"gpu": "NVIDIA H100 80GB HBM3"}, "make bench-gpu", ours_alone=[{"size": "4 layers"}])
    table.write(rows, cpu, "make bench")
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        "intel-xeon-2-cores.json",
        "nvidia-h100-80gb-hbm3.json",
    }
    text = (tmp_path / "page.md").read_text()
    assert text.count("### Intel Xeon, 2 cores") == text.count("### NVIDIA H100 80GB HBM3") == 1
    assert text.count("| a step | theirs | 2.00x |") == 2
    assert "- size 4 layers" in text
