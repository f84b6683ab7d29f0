"""What is declared is what is used, and what is pinned."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORT_NAMES = {"pyyaml": "yaml", "pillow": "PIL", "scikit-learn": "sklearn"}


def distribution(requirement: str) -> str:
    """`torch>=2.11` -> `torch`"""
    return re.split(r"[\s\[<>=!~;]", requirement)[0].lower()


def imported(folder: Path) -> set[str]:
    """Top-level names of everything imported below a folder, its own and the standard library's left out."""
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {folder.name}


def import_names(requirements: list[str]) -> set[str]:
    return {IMPORT_NAMES.get(name, name) for name in map(distribution, requirements)}


def test_the_package_imports_what_it_declares_and_nothing_else() -> None:
    runtime = import_names(PROJECT["dependencies"])
    used = imported(ROOT / "aria_train")
    assert runtime - used == set(), "declared, never imported"
    assert used - runtime == {"wandb"}, "imported, not declared (wandb is an extra, imported when asked for)"


def test_the_demo_imports_only_what_its_extra_adds() -> None:
    extra = import_names(PROJECT["optional-dependencies"]["demo"])
    used = imported(ROOT / "demo") - {"aria_train", "benchmarks"}
    assert used - import_names(PROJECT["dependencies"]) == extra


def test_every_declared_distribution_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    extras = PROJECT["optional-dependencies"]
    declared = [
        *PROJECT["dependencies"],
        *(line for name in ("tensorboard", "wandb", "demo", "dev") for line in extras[name]),
    ]
    missing = {distribution(line) for line in declared} - set(pins) - {"aria_train"}
    assert missing == set()
    # A local build of torch, or the parts of one, would tie every user to one platform.
    assert "+" not in pins["torch"]
    assert not [name for name in pins if name.startswith(("nvidia", "triton"))]
