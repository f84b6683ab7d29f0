"""Pages of the documentation in which a command writes the part between two marks."""

from __future__ import annotations

from pathlib import Path


def fill(page: Path, name: str, text: str) -> None:
    """Puts `text` between the lines `<!-- name -->` and `<!-- end of name -->`, in place of what stood there."""
    begin, end = _marks(name)
    whole = page.read_text(encoding="utf-8")
    before, found_begin, rest = whole.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"{page}: the lines {begin} and {end} must stand in it, in this order.")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def fill_or_add(page: Path, name: str, text: str) -> None:
    """The same, where a page without the two lines gets them at its end."""
    whole, marks = page.read_text(encoding="utf-8"), _marks(name)
    if not any(mark in whole for mark in marks):
        page.write_text(f"{whole.rstrip()}\n\n{marks[0]}\n\n{marks[1]}\n", encoding="utf-8")
    fill(page, name, text)


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->", f"<!-- end of {name} -->"
