"""The demo's command line: which of the two demos, and errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from ._common import DemoError, Parser


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: 0, or one line on stderr and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv and not argv[0].startswith("-") else ""
    parser = Parser(f"proxy-losses-demo {command}".strip(), "", "", [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small are slower on several
    try:
        from . import _ranking, _retrieval

        demos = {"": _ranking.run, "retrieval": _retrieval.run}
        if command not in demos:
            parser.error(
                "there is no such command. The demos are: proxy-losses-demo [flags], and "
                "proxy-losses-demo retrieval [flags]; --help of either explains it"
            )
        demos[command](argv)
    except DemoError as error:
        parser.error(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("proxy_losses"):
            raise
        parser.error(f'the demo needs the package {error.name!r}: pip install ".[demo]"')
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
