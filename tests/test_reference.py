"""The reference: every public name has a page that says what it should, and its links resolve."""

from __future__ import annotations

import builtins
import importlib.util
import inspect
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import proxy_losses

pytest.importorskip("pdoc")

_spec = importlib.util.spec_from_file_location(
    "reference", Path(__file__).parents[1] / ".ci" / "reference.py"
)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

SECTIONS = ("Arguments", "Returns", "Raises", "Example")
# What a function may lack, and why.
LACKS = {
    "score_spread": {"Raises"},  # nothing is checked
    "queue_rows": {"Raises"},
    "reset_queue": {"Raises"},
    "world_size": {"Arguments", "Returns", "Raises", "Example"},  # one line says it all
    "all_gather_with_grad": {"Example"},  # takes processes
    "all_gather_no_grad": {"Arguments", "Returns", "Raises", "Example"},  # names that function
}
# Rows are kept, looked up or moved, and nothing is computed of which there is a formula.
NO_FORMULA = {
    "all_gather_no_grad", "all_gather_with_grad", "enqueue", "enqueue_embeddings", "query_lists",
    "init_memory", "init_queue", "init_schedule", "make_compute_loss", "partial_auc_defined",
    "queue_rows", "recall_defined", "reset_memory", "reset_queue", "set_debug",
    "smooth_ap_defined", "smooth_auroc_defined", "smooth_mrr_defined", "smooth_ndcg_defined",
    "start_epoch", "start_step", "state_temp", "state_weight", "world_size",
}  # fmt: skip
MODULES = reference.public_modules()
FILES = reference.guide_files()
NAMES = [
    (module, name)
    for module in MODULES
    for name in reference.public_names(module)
    if callable(getattr(module, name))
]


def sections(html: str) -> dict[str, str]:
    """What is rendered of every name of a module."""
    return dict(re.findall(r'<section id="([\w.]+)">(.*?)</section>', html, re.DOTALL))


def own_text(section: str) -> str:
    """Without the members of a class."""
    return section.split('class="classattr"')[0].partition('<div class="docstring">')[2]


def missing(name: str, thing: object, text: str) -> set[str]:
    """What the text of a function or class should have and does not."""
    if not re.sub("<[^>]*>|\\s", "", text):
        return {"docstring"}
    heads = set(re.findall(r"<h6 [^>]*>(\w+):</h6>", text))
    if inspect.isclass(thing):
        wanted = {"Example"} if name in proxy_losses.__all__ else set()
        if issubclass(thing, tuple):
            return wanted - heads
        return (wanted | {"Arguments"} if "Example" in wanted else set()) - heads
    gaps = set(SECTIONS) - heads - LACKS.get(name, set())
    formula = re.search(r"<code>[^<]*[ (][^<]*</code>", text.split("<h6")[0])
    return gaps | ({"formula"} if not formula and name not in NO_FORMULA else set())


def known_names(modules: list[ModuleType]) -> set[str]:
    """Names that a text may use without a link: of arguments, members and fields."""
    known = set()
    for module in modules:
        for name in reference.public_names(module):
            thing = getattr(module, name)
            members = [thing]
            if inspect.isclass(thing):
                known |= {n for n in dir(thing) if not n.startswith("_")}
                attributes = inspect.getdoc(thing).partition("\nAttributes:\n")[2]
                known |= set(re.findall(r"^    (\w+):", attributes.split("\n\n")[0], re.M))
                members += [m for m in vars(thing).values() if inspect.isfunction(m)]
            for member in members:
                if callable(member):
                    known |= set(inspect.signature(member).parameters)
    return known


def exists(name: str) -> bool:
    """Whether a dotted name leads to something outside of the package."""
    first, *rest = name.split(".")
    rest = rest if first != "nn" else ["nn", *rest]
    thing = getattr(builtins, first, None)
    if thing is None:
        if first not in {"torch", "nn", "transformers", "lightning"}:
            return False
        thing = importlib.import_module("torch" if first == "nn" else first)
    for part in rest:
        thing = getattr(thing, part, None)
    return thing is not None


def dangling(html: str, known: set[str], symbols: set[str]) -> set[str]:
    """Code that looks like a name, has no link and is neither known nor a part of what is."""
    spans = set(re.findall(r"<code>([A-Za-z_][\w.]*)(?:\([^<]*\))?</code>", html)) - symbols
    return {name for name in spans if name.split(".")[0] not in known and not exists(name)}


def symbols_of(modules: list[ModuleType]) -> set[str]:
    """Symbols of formulas: what docstrings set in two backticks."""
    things = [
        getattr(module, name) for module in modules for name in reference.public_names(module)
    ]
    texts = "".join(inspect.getsource(thing) for thing in things if callable(thing))
    return set(re.findall(r"``([A-Za-z][\w.]*)(?:\([^`]*\))?``", texts))


def undocumented(cls: type) -> set[str]:
    """Public methods and properties of ours that have no text."""
    ours = [c for c in cls.__mro__ if c.__module__.startswith("proxy_losses")]
    return {
        name
        for c in ours
        for name, member in vars(c).items()
        if not name.startswith("_")
        and (inspect.isfunction(member) or isinstance(member, property))
        and not member.__doc__
    }


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("reference")
    reference.render(MODULES, out, FILES)
    return out


@pytest.fixture(scope="module")
def pages(site) -> dict[str, str]:
    return {m.__name__: (site / reference.html_of(m.__name__)).read_text() for m in MODULES}


# -- the site


def test_every_guide_is_a_page(site):
    guide = Path(proxy_losses.__file__).parent / "guide"
    assert set(guide.rglob("*.md")) <= set(FILES.values())
    assert {site / reference.html_of(name) for name in FILES} <= set(site.rglob("*.html"))
    assert len(list(site.rglob("*.html"))) == len(FILES) + len(MODULES) + 1  # the index
    assert "guide.html" in (site / "index.html").read_text()


def test_links_of_the_site_lead_somewhere(site):
    texts = {
        path: re.sub(r"<script>.*?</script>", "", path.read_text(), flags=re.DOTALL)
        for path in site.rglob("*.html")
    }
    anchors = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in texts.items()}
    for path, text in texts.items():
        for target in re.findall(r'\b(?:href|src)="([^"]+)"', text):
            file, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target):
                assert re.match("data:|https:", target), f"{path.name}: {target}"
                continue
            there = (path.parent / file).resolve() if file else path
            assert there.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors.get(there, {anchor}), f"{path.name}: {target}"


def test_the_site_needs_no_network(site):
    for path in site.rglob("*.html"):
        assert not re.search(r"<(script|link|img)\b[^>]*https?://", path.read_text()), path.name
    found = (site / "search.js").read_text()
    assert "because a rank depends on all rows" in found.lower()
    assert "smooth_ap_saturation" in found


def test_a_page_with_a_broken_link_raises(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `page`\n[no](no_such_file.md)\n")
    assert reference.title_of(page.read_text()) == "A page"
    with pytest.raises(FileNotFoundError, match=r"page\.md links to no_such_file\.md"):
        reference.render([], tmp_path / "out", {"guide.page": page})


def test_modules():
    names = {module.__name__ for module in MODULES}
    assert {"proxy_losses", "proxy_losses.nn", "proxy_losses.distributed"} <= names
    for package, integration in (
        ("lightning", "lightning"),
        ("transformers", "huggingface"),
        ("sklearn", "sklearn"),
    ):
        if find_spec(package):
            assert f"proxy_losses.integrations.{integration}" in names
    assert "proxy_losses.ap_loss" not in names  # another path to SmoothAPLoss


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda x: getattr(x, "__name__", x))
def test_page_says_what_it_should(pages, module, name):
    thing = getattr(module, name)
    assert not missing(name, thing, own_text(sections(pages[module.__name__])[name]))
    if inspect.isclass(thing):
        assert not undocumented(thing)


def test_exceptions_are_needed(pages):
    for name in set(LACKS) | NO_FORMULA:
        module = next(m for m, n in NAMES if n == name)
        text = own_text(sections(pages[module.__name__])[name])
        if name in LACKS:
            assert not LACKS[name] & set(re.findall(r"<h6 [^>]*>(\w+):</h6>", text)), name


def test_fields_have_a_text(pages):
    assert "Alias for field number" not in pages["proxy_losses"]
    html = sections(pages["proxy_losses"])["QueueState"]
    assert "&gt;= 0, steps before the switch" in pages["proxy_losses"]
    for field in proxy_losses.QueueState._fields:
        own = html.split(f'<div id="QueueState.{field}" ')[1].split("<div id=")[0]
        assert re.search(r'class="docstring"><p>\[', own), field


def test_references_lead_somewhere(pages):
    known, symbols = known_names(MODULES), symbols_of(MODULES)
    for html in pages.values():
        assert not dangling(html, known, symbols)
        for target in re.findall(r'<code><a href="#([^"]+)">', html):
            assert f'id="{target}"' in html


def test_pages_are_in_the_order_of_their_indexes():
    guide = Path(proxy_losses.__file__).parent / "guide"
    assert {*guide.rglob("*.md")} <= {*FILES.values()}
    for index, prefix in ((guide, "guide."), (guide / "losses", "guide.losses.")):
        named = re.findall(r"^\| \[.*?\]\((\w+)", (index / "README.md").read_text(), re.M)
        pages = [name.removeprefix(prefix) for name in FILES if name.startswith(prefix)]
        assert [name for name in pages if name in named] == named


def test_links_are_made(pages):
    html = sections(pages["proxy_losses"])["smooth_ap_loss"]
    assert '<a href="#smooth_ap">' in html
    html = sections(pages["proxy_losses"])["SmoothAPLoss"]
    assert '<a href="proxy_losses/nn.html#RankingLoss.forward">' in html
    link = '<a href="../../proxy_losses.html#LossWarmupWrapper">'
    assert link in pages["proxy_losses.integrations.lightning"]


BROKEN = '''
"""A module with mistakes."""
from __future__ import annotations
from typing import NamedTuple
class Row(NamedTuple):
    """A row."""
    size: int
def silent(x: int) -> int:
    return x
def gaps(x: int) -> int:
    """Like `no_such_loss` of `x`, `torch.no_such_thing` and `torch.quantile`.

    Args:
        x: a number.
    """
    return x
class Loss:
    """A loss.

    Args:
        x: a number.
    """
    def __init__(self, x: int) -> None: ...
    def method(self) -> None: ...
Loss.__module__ = Loss.method.__module__ = "proxy_losses.broken"
'''


@pytest.fixture
def broken(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def make(text: str, name: str) -> ModuleType:
        (tmp_path / f"{name}.py").write_text(text)
        return importlib.import_module(name)

    yield make
    for name in ("broken_names", "broken_types"):
        sys.modules.pop(name, None)


def test_mistakes_are_found(broken, tmp_path):
    module = broken(BROKEN, "broken_names")
    module.__all__ = ["Row", "silent", "gaps", "Loss"]
    reference.render([module], tmp_path / "out")
    html = (tmp_path / "out" / "broken_names.html").read_text()
    found = sections(html)
    assert "silent" not in found  # nor would any other name without a text be
    assert missing("silent", module.silent, "<div> </div>") == {"docstring"}
    gaps = {"Returns", "Raises", "Example", "formula"}
    assert missing("gaps", module.gaps, own_text(found["gaps"])) == gaps
    assert missing("SmoothAPLoss", module.Loss, own_text(found["Loss"])) == {"Example"}
    assert missing("SoftRanks", module.Row, own_text(found["Row"])) == {"Example"}
    assert undocumented(module.Loss) == {"method"}
    assert dangling(html, known_names([module]), set()) == {"no_such_loss", "torch.no_such_thing"}


def test_a_warning_is_an_error(broken, tmp_path):
    text = 'from __future__ import annotations\ndef f(x: NoSuchType) -> None:\n    """A."""\n'
    module = broken(text, "broken_types")
    with pytest.raises(UserWarning, match="NoSuchType"):
        reference.render([module], tmp_path / "out")


def test_an_integration_without_its_package_is_left_out(monkeypatch):
    if not find_spec("lightning"):
        pytest.skip("its package is missing anyway")
    name = "proxy_losses.integrations.lightning"
    for package in ("lightning", "lightning.pytorch", "pytorch_lightning", name):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, name)
    assert name not in {module.__name__ for module in reference.public_modules()}
