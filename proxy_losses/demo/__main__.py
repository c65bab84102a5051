"""The demo's command line: which of the two demos, and errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ._common import DemoError, Parser


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: 0, or one line on stderr and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser("proxy-losses-demo", "", "")
    try:
        if argv[:1] == ["retrieval"]:
            from . import _retrieval

            _retrieval.run(argv[1:])
        else:
            from . import _ranking

            _ranking.run(argv)
    except DemoError as error:
        parser.error(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("proxy_losses"):
            raise
        parser.error(f'the demo needs the package {error.name!r}: pip install ".[demo]"')
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
