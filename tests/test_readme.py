"""README and guides: code runs, links lead somewhere, figures are measured, pages keep a form."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import proxy_losses as P
from benchmarks import help_page, linear_ranker_page, pictures
from benchmarks.real_data.stats import parts
from proxy_losses._metrics import METRICS

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "proxy_losses" / "guide"
TEXT = (ROOT / "README.md").read_text()
FOLDERS = [ROOT / name for name in ("benchmarks", "notebooks", "proxy_losses", "tests")]  # no venv
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in folder.rglob("*.md"))])
# Each block of code, and what the page says that it prints.
BLOCKS = [
    pytest.param(
        path, block, said, id=f"{path.relative_to(ROOT)}: {block.strip().splitlines()[-1][:40]}"
    )
    for path in PAGES
    for block, said in re.findall(
        r"```python\n(.*?)```(?:\n```text\n(.*?)```)?", path.read_text(), re.DOTALL
    )
]
LOSS_PAGES = sorted(p for p in (GUIDE / "losses").glob("*.md") if p.name != "README.md")


def name_of(path: object) -> str | None:
    return str(path.relative_to(ROOT)) if isinstance(path, Path) else None


every_page = pytest.mark.parametrize("path", PAGES, ids=name_of)
every_loss_page = pytest.mark.parametrize("path", LOSS_PAGES, ids=lambda p: p.stem)


# -- code


def test_there_are_blocks():
    assert {block.values[0].relative_to(ROOT).parts[0] for block in BLOCKS} >= {
        "README.md",
        "proxy_losses",
    }


@pytest.mark.parametrize(("path", "block", "said"), BLOCKS)
def test_block_runs(path, block, said, capsys):
    exec(compile(block, str(path), "exec"), {"__name__": "readme"})
    if not said:
        return
    number, printed = r"\d\.\d+", capsys.readouterr().out
    assert re.sub(number, "", said) == re.sub(number, "", printed)
    got, expected = (list(map(float, re.findall(number, x))) for x in (printed, said))
    assert got == pytest.approx(expected, abs=0.021)  # another machine adds up in another order


def test_the_first_loop_says_what_it_prints():
    first = next(b for b in BLOCKS if b.values[0] == ROOT / "README.md")
    assert "average precision 0." in first.values[2]


# -- the README


def test_first_lines():
    assert "not the Proxy-NCA" in TEXT.splitlines()[0]
    assert len(TEXT.splitlines()) <= 150
    first = re.findall(r"^```.*?\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)[0]
    assert first.splitlines() == [  # as .ci/run reads them
        'pip install ".[demo]" && python -m proxy_losses.demo',
        'pip install -e ".[test]" && pytest',
    ]


# -- links


@every_page
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        if "://" in target:
            continue
        file = path.parent / target if target else path
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}
            assert anchor in slugs, f"{target}#{anchor}"


def test_every_guide_is_in_the_index():
    for folder in (GUIDE, GUIDE / "losses"):
        index = (folder / "README.md").read_text()
        pages = {p.relative_to(folder) for p in folder.glob("*.md")} - {Path("README.md")}
        for page in pages:
            assert f"]({page})" in index, page


# -- pages of the losses

PARTS = ["What it measures", "Formula", "Use it", "When to use it", "When not"]


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_every_loss_has_a_page_and_a_picture(metric):
    assert GUIDE / "losses" / f"{metric.name}.md" in LOSS_PAGES
    assert (GUIDE / "losses" / f"{metric.name}.png").stat().st_size < 60_000


@every_loss_page
def test_pages_of_losses_keep_the_form(path):
    text = path.read_text()
    heads = re.findall(r"^# .+: `\w+`", text, re.MULTILINE)
    assert len(heads) == 1
    assert text.startswith(heads[0])
    parts = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [part for part in parts if part in PARTS] == PARTS
    assert len(text.splitlines()) <= 62
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 12
    assert "print(" in block
    if path.with_suffix(".png").exists():
        assert f"]({path.stem}.png)" in text


def test_pictures_are_drawn_from_the_records(tmp_path):
    scores, pos = pictures.the_list()
    for metric in METRICS:
        _, _, gradient = pictures.pushes(metric)
        assert gradient.shape == scores.shape, metric.name
        assert gradient[pos].max() > 0 > gradient[~pos].min(), metric.name
    drawn = pictures.draw(tmp_path, [METRICS[0], None])
    assert [p.name for p in drawn] == [f"{METRICS[0].name}.png", "focal.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in drawn)


# -- the table of errors

FAILURES = (GUIDE / "failures.md").read_text()
ERRORS = [
    pytest.param(*row, id=row[0])
    for row in re.findall(
        r"^\| `(.+?)` \| (.+?) \| `(.+?)` \|$",
        FAILURES.split("## Error messages")[1].split("\n## ")[0],
        re.MULTILINE,
    )
]


@pytest.fixture(scope="module")
def first_hour():
    names: dict[str, object] = {"__name__": "failures"}
    exec(re.findall(r"```python\n(.*?)```", FAILURES, re.DOTALL)[0], names)
    return names


def test_the_table_of_errors_was_found():
    assert len(ERRORS) >= 20


@pytest.mark.parametrize(("wrote", "says", "instead"), ERRORS)
def test_an_error_says_what_to_write(wrote, says, instead, first_hour):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=re.escape(says)):
        eval(wrote, first_hour)
    eval(instead, first_hour)


def test_what_raises_nothing(first_hour):
    logits, loss_fn = first_hour["logits"].clone().requires_grad_(), first_hour["loss_fn"]
    assert torch.sigmoid(logits + 20).unique().numel() == 1
    nothing = loss_fn(logits, torch.zeros(64, dtype=torch.int64))
    nothing.backward()
    assert nothing.item() == 0
    assert not logits.grad.any()
    with pytest.warns(UserWarning, match="was never called"):
        first_hour["run"](first_hour["column"], hook=False)
    with pytest.warns(UserWarning, match="count as positive"):
        loss_fn(logits, 2 * first_hour["targets"] - 1)
    assert P.smooth_ap(first_hour["scores"], first_hour["pos"], torch.tensor(0.0)).isnan()
    assert P.smooth_ap(logits, first_hour["pos"][:, None], 0.1).tolist() == [0.0] * 64


# -- figures


def test_scorecards_are_as_measured():
    """Between the marks of the page stands what the committed runs say."""
    page = linear_ranker_page.PAGE.read_text()
    blocks = linear_ranker_page.blocks()
    assert {"tables", "screen", "made"} <= blocks.keys()
    for mark, block in blocks.items():
        assert f"<!-- {mark}: begin -->\n{block}\n<!-- {mark}: end -->" in page


COMMITTED = (GUIDE / "does_it_help.md").read_text().split("## Measured outside")[0]


def test_gains_are_those_of_the_benchmark():
    page = (ROOT / "benchmarks/real_data/README.md").read_text()
    gains = re.findall(r"[+-][\d.]+ ± [\d.]+", COMMITTED + TEXT)
    assert len(gains) >= 20
    for gain in gains:
        assert gain in page, gain


def test_the_map_is_that_of_the_runs():
    runs = help_page.read()
    text = help_page.PAGE.read_text()
    assert help_page.filled(text, runs) == text
    assert not any(part["dirty"] for run in runs.values() for part in parts(run))
    # A figure of another page, by way of another room.
    (one,) = help_page.in_map("linear, 5")(runs["real_data_map"])
    assert f"[{one.low:+.1f}, {one.high:+.1f}], {one.up}/{one.down} |" in (
        (ROOT / "benchmarks/real_data/MAP.md").read_text()
    )


@pytest.mark.slow
def test_the_map_is_drawn(tmp_path):
    page, picture = tmp_path / "page.md", tmp_path / "map.png"
    page.write_text(help_page.PAGE.read_text())
    assert help_page.main(page, picture) == 0
    assert page.read_text() == help_page.PAGE.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


def results(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_times_are_as_measured():
    page = (ROOT / "benchmarks/README.md").read_text()
    theirs = {c["name"]: c["contenders"]["imbalanced_losses"] for c in results("losses")["cases"]}
    for loss, cells in re.findall(r"^\| `(\w+)` \| (.+) \|$", page, re.MULTILINE):
        if loss.endswith("Loss"):
            sizes = "1 class", "10 classes", "1000 classes"
            for classes, cell in zip(sizes, cells.split(" | "), strict=True):
                if cell != "-":
                    ratio = theirs[f"{loss}, {classes}"]["ratio"]
                    assert float(cell) == pytest.approx(ratio, rel=0.025), f"{loss}, {classes}"
    (said,) = re.findall(r"normal scores, tau 0.01 / 0.05 / 0.5 \| .* \| ([\d. /]+) of", page)
    cases = {c["name"]: c["contenders"] for c in results("ranks")["cases"]}
    for tau, cell in zip((0.01, 0.05, 0.5), said.split(" / "), strict=True):
        found = cases[f"smooth_ap, normal, M = 1,000,000, 5 %, tau {tau:g}"]["torch.sort"]
        assert float(cell) == pytest.approx(1 / found["ratio"], abs=0.006)


def test_differences_from_the_published_packages_are_tested():
    named = re.findall(r"\| `(test_\w+)` \|", (GUIDE / "migrating.md").read_text())
    assert len(named) >= 8
    for name in named:
        assert (ROOT / "tests" / f"{name}.py").exists(), name
