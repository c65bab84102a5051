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
    compared = json.loads(file.read_text())["compared"]["all features"]
    for table, gain in compared["all"]["ranker - logistic"]["ap"]["tables"].items():
        assert re.search(
            rf"\| {re.escape(table)}\*? \|.*\| {re.escape(f'{gain:+.2f}')} \|", page
        ), table
    for group in compared.values():
        found = group["ranker - logistic"]["ap"]
        cells = f"{interval(found['overall'])} | {found['up']} / {found['down']} |"
        assert cells in page
    screen = json.loads((file.parent / "linear_ranker_screen.json").read_text())["compared"]
    assert f"by {interval(screen['ranker']['enrichment']['overall'])}" in " ".join(page.split())


def test_gains_are_those_of_the_benchmark():
    section = TEXT.split("## Does it help?")[1].split("\n## ")[0]
    page = (ROOT / "benchmarks/real_data/README.md").read_text()
    gains = re.findall(r"[+-][\d.]+ ± [\d.]+", section)
    assert len(gains) >= 10
    for gain in gains:
        assert gain in page


def interval(found: dict[str, float]) -> str:
    return f"{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def test_differences_from_the_published_packages_are_tested():
    section = TEXT.split("## Coming from")[1].split("\n## ")[0]
    named = re.findall(r"\| `(test_\w+)` \|", section)
    assert len(named) >= 8
    for name in named:
        assert (ROOT / "tests" / f"{name}.py").exists(), name
