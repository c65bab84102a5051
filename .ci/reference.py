"""Renders the docstrings of all public modules: ``python .ci/reference.py OUT``.

A warning of pdoc is an error.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import re
import typing
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pdoc

import proxy_losses

# An integration may lack its package.
OPTIONAL = {"lightning", "pytorch_lightning", "sklearn", "transformers"}


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


def render(modules: Sequence[ModuleType], out: Path) -> None:
    """One page for each module, an index and a search."""
    for module in modules:
        for name in public_names(module):
            if inspect.isclass(getattr(module, name)):
                describe(getattr(module, name))
    pdoc.render.configure(docformat="google", include_undocumented=False, show_source=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc(*(module.__name__ for module in modules), output_directory=out)
    for module in modules:
        page = out / f"{module.__name__.replace('.', '/')}.html"
        page.write_text(finish(page.read_text(), module.__name__.count(".")))


def finish(html: str, depth: int) -> str:
    """Link names of the package from other pages too; leave out decorators, which are internal."""
    html = re.sub(r'<div class="decorator [^>]*>[^<]*</div>', "", html)
    names = "|".join(proxy_losses.__all__)
    target = "../" * depth + "proxy_losses.html"
    return re.sub(rf"<code>({names})</code>", rf'<code><a href="{target}#\1">\1</a></code>', html)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    options = argparse.ArgumentParser(prog="python .ci/reference.py")
    options.add_argument("out", type=Path, help="folder of the pages")
    args = options.parse_args(argv)
    modules = public_modules()
    render(modules, args.out)
    print(*(module.__name__ for module in modules), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
