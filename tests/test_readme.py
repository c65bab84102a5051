"""The code of README and guides runs as printed; what they link to exists; figures are measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
PAGES = sorted(p for p in ROOT.rglob("*.md") if not p.relative_to(ROOT).parts[0].startswith("."))
BLOCKS = [
    pytest.param(path, block, id=f"{path.relative_to(ROOT)}: {block.strip().splitlines()[-1][:40]}")
    for path in PAGES
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
]


def test_there_are_blocks():
    assert {block.values[0].relative_to(ROOT).parts[0] for block in BLOCKS} >= {
        "README.md",
        "proxy_losses",
    }


@pytest.mark.parametrize(("path", "block"), BLOCKS)
def test_block_runs(path, block):
    exec(compile(block, str(path), "exec"), {"__name__": "readme"})


def test_first_line_says_what_it_is_not():
    assert "not the Proxy-NCA" in TEXT.splitlines()[0]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_it_links_to_exist(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        assert "://" in target or (path.parent / target).exists(), target


def test_scorecards_are_as_measured():
    """The table of LinearRanker against its controls is that of the committed run."""
    page = (ROOT / "proxy_losses/integrations/README.md").read_text()
    file = ROOT / "benchmarks/results/linear_ranker.json"
    compared = json.loads(file.read_text())["compared"]["ap, 5 features"]
    found = [compared[control]["ap"] for control in ("logistic", "continued")]
    for table in found[0]["tables"]:
        cells = [interval(x["tables"][table]) for x in found]
        assert re.search(rf"\| {table} \|.*\| {re.escape(' | '.join(cells))} \|", page), table
    cells = " | ".join(interval(x["overall"]) for x in found)
    assert f"| mean over tables | | | | {cells} |" in page


def interval(found: dict[str, float]) -> str:
    return f"{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def test_differences_from_the_published_packages_are_tested():
    section = TEXT.split("## Coming from")[1].split("\n## ")[0]
    named = re.findall(r"\| `(test_\w+)` \|", section)
    assert len(named) >= 8
    for name in named:
        assert (ROOT / "tests" / f"{name}.py").exists(), name
