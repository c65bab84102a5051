"""The README's code runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_there_are_blocks():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.strip().splitlines()[-1][:40])
def test_block_runs(block):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_first_line_says_what_it_is_not():
    assert "not the Proxy-NCA" in TEXT.splitlines()[0]


def test_files_it_links_to_exist():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    local = [target for target in links if "://" not in target]
    assert local
    for target in local:
        assert (ROOT / target).exists(), target


def test_differences_from_the_published_packages_are_tested():
    section = TEXT.split("## Coming from")[1].split("\n## ")[0]
    named = re.findall(r"\| `(test_\w+)` \|", section)
    assert len(named) >= 8
    for name in named:
        assert (ROOT / "tests" / f"{name}.py").exists(), name
