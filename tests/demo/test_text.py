"""The demo's text corpus."""

import json
from pathlib import Path

import pytest

from demo.shell import DemoError
from demo.text import write_sources


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small stand-in for the standard library."""
    files = {
        "zlib_.py": b"z = 1\n",
        "a/b.py": "# caf\u00e9\n".encode(),
        "a-b.py": b"dash\n",
        "copy_of_z.py": b"z = 1\n",
        "latin.py": b"# caf\xe9\n",
        "empty.py": b"\n",
        "notes.txt": b"not Python\n",
        "site-packages/other.py": b"other\n",
    }
    for name, content in files.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "lib"


def test_sources_are_written_once_each_in_a_fixed_order(library: Path, tmp_path: Path) -> None:
    output = tmp_path / "raw" / "python.jsonl"
    count, size = write_sources(library, output)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(record["path"], record["text"]) for record in records] == [
        ("a-b.py", "dash\n"),
        ("a/b.py", "# caf\u00e9\n"),
        ("copy_of_z.py", "z = 1\n"),
    ]
    assert (count, size) == (3, 5 + 7 + 6)
    assert list(output.parent.iterdir()) == [output]


def test_a_python_without_sources_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="no Python sources"):
        write_sources(tmp_path / "nothing", tmp_path / "raw" / "python.jsonl")
    assert list((tmp_path / "raw").iterdir()) == []
