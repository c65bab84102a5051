"""Renders guides and docstrings as one site: ``python .ci/reference.py OUT``.

Every Markdown file of ``proxy_losses/guide`` and of `ELSEWHERE` is a page, every public module one
more. A warning of pdoc is an error, and so is a link that leads nowhere.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import pkgutil
import re
import shutil
import typing
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pdoc
import pdoc.doc

import proxy_losses

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "proxy_losses" / "guide"
# An integration may lack its package.
OPTIONAL = {"lightning", "pytorch_lightning", "sklearn", "transformers"}
# Files beside the guides that are pages of the site too.
ELSEWHERE = {
    "guide.integrations": "proxy_losses/integrations/README.md",
    "guide.readme": "README.md",
    "guide.ranks": "proxy_losses/_ranks/README.md",
    "guide.house": "proxy_losses/README.md",
    "guide.changes": "CHANGELOG.md",
}


def public_names(module: ModuleType) -> list[str]:
    """``__all__``, or what the module itself defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    own = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
    return [n for n in own if not n.startswith("_")]


def public_modules() -> list[ModuleType]:
    """The package and its modules, without those that have no name of their own."""
    found = [proxy_losses]
    for info in pkgutil.walk_packages(proxy_losses.__path__, "proxy_losses."):
        if any(part.startswith("_") for part in info.name.split(".")):
            continue
        try:
            module = importlib.import_module(info.name)
        except ImportError as error:
            missing = (getattr(error.__cause__, "name", None) or "").split(".")[0]
            if missing not in OPTIONAL:
                raise
            continue
        if set(public_names(module)) - set(proxy_losses.__all__):
            found.append(module)
    return found


# -- pages of Markdown


def linked(index: Path) -> list[Path]:
    """The pages beside and below an index, in the order of its links."""
    return [index.parent / to for to in re.findall(r"\]\((\w[\w/]*\.md)\)", index.read_text())]


def guide_files() -> dict[str, Path]:
    """Name of each page -> its file: guides and losses in the order of their indexes, others."""
    found = {"guide": GUIDE / "README.md"}
    for path in linked(GUIDE / "README.md"):
        if path.name != "README.md":
            found[f"guide.{path.stem}"] = path
            continue
        folder = f"guide.{path.parent.name}"
        found |= {folder: path} | {f"{folder}.{page.stem}": page for page in linked(path)}
    found |= {name: ROOT / path for name, path in ELSEWHERE.items()}
    for path in sorted((ROOT / "benchmarks").rglob("*.md")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found["guide." + "_".join(part for part in parts if part != "README").lower()] = path
    return found


def title_of(text: str) -> str:
    """The first heading; the README has none."""
    match = re.match(r"# (.+)", text)
    return match[1].replace("`", "") if match else "README"


def html_of(name: str) -> str:
    """Path of a page below the site's root."""
    return name.replace(".", "/") + ".html"


def from_page(target: str, name: str) -> str:
    """A path below the root as seen from a page."""
    return os.path.relpath(target, Path(html_of(name)).parent).replace(os.sep, "/")


def as_page(name: str, files: Mapping[str, Path], out: Path) -> ModuleType:
    """A Markdown file as a module without members, its links those of the site.

    Pictures and other files that it links to are copied beside the pages.
    """
    path, pages = files[name], {file: page for page, file in files.items()}

    def relinked(match: re.Match[str]) -> str:
        target, hash_, anchor = match[2].partition("#")
        if not target or "://" in target:
            return match[0]
        file = (path.parent / target).resolve()
        if file in pages:
            there = html_of(pages[file])
        elif file.is_file():
            there = f"files/{file.relative_to(ROOT)}"
            (out / there).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / there)
        else:
            raise FileNotFoundError(f"{path.name} links to {target}")
        return f"{match[1]}({from_page(there, name)}{hash_}{anchor})"

    parts = re.split(r"(^```.*?^```$)", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [re.sub(r"(\])\(([^)\s]+)\)", relinked, part) for part in parts[::2]]
    module = ModuleType(name, "".join(parts))
    module.__dict__.update(__docformat__="markdown", __all__=[])
    return module


# -- docstrings


def describe(cls: Any) -> None:
    """Give pdoc the texts that it does not see."""
    if "__init__" in vars(cls) and not cls.__init__.__doc__:
        cls.__init__.__doc__ = "The arguments are described above."  # not those of nn.Module
    if hasattr(cls, "_fields"):  # of a NamedTuple: types, and the comment beside each field
        cls.__new__.__annotations__ = typing.get_type_hints(cls)
        comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.M))
        for field in cls._fields:
            text = comments.get(field, "")
            getattr(cls, field).__doc__ = text.replace(">", r"\>")  # else a quotation


def render(modules: Sequence[ModuleType], out: Path, files: Mapping[str, Path] = {}) -> None:
    """One page for each file and module, an index and a search."""
    for module in modules:
        for name in public_names(module):
            if inspect.isclass(getattr(module, name)):
                describe(getattr(module, name))
    out.mkdir(parents=True, exist_ok=True)
    every = [*(as_page(name, files, out) for name in files), *modules]
    pdoc.render.configure(
        docformat="google", include_undocumented=False, show_source=False,
        template_directory=Path(__file__).with_name("site"),
    )  # fmt: skip
    titles = {name: title_of(file.read_text()) for name, file in files.items()}
    more = [name for name, file in files.items() if GUIDE not in file.parents]
    more = [name for name in more if name != "guide.integrations"]
    pdoc.render.env.globals.update(
        guides=titles,
        parts={
            "Guides": [name for name in files if name not in more],
            "Reference": [m.__name__ for m in modules],
            "More": more,
        },
        from_page=lambda target, name: from_page(html_of(target), name),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pages = {m.__name__: pdoc.doc.Module(m) for m in every}
        for name, page in pages.items():
            path = out / html_of(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(finish(pdoc.render.html_module(page, pages), name))
        (out / "index.html").write_text(pdoc.render.html_index(pages))
        (out / "search.js").write_text(pdoc.render.search_index(pages))


def finish(html: str, name: str) -> str:
    """Link names of the package from other pages too; leave out decorators, which are internal."""
    html = re.sub(r'<div class="decorator [^>]*>[^<]*</div>', "", html)
    html = html.replace("<table>", '<div class="wide"><table>').replace(
        "</table>", "</table></div>"
    )
    names, target = "|".join(proxy_losses.__all__), from_page("proxy_losses.html", name)
    contents, main, text = html.partition("<main")  # links in the contents lead to headings
    text = re.sub(rf"<code>({names})</code>", rf'<code><a href="{target}#\1">\1</a></code>', text)
    return contents + main + text


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    options = argparse.ArgumentParser(prog="python .ci/reference.py")
    options.add_argument("out", type=Path, help="folder of the pages")
    args = options.parse_args(argv)
    modules, files = public_modules(), guide_files()
    render(modules, args.out, files)
    print(*files, *(module.__name__ for module in modules), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
