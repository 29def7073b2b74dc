"""The command ``pyworkflow``: one module per command group, each imported when it is used."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line, by default with the arguments of the process, and exit."""
    from importlib.util import find_spec

    missing = [name for name in ("click", "rich") if find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"the command line needs {' and '.join(missing)}: pip install 'pyworkflow-core[cli]'\n"
        )
        sys.exit(2)
    from pyworkflow.cli._root import execute

    sys.exit(execute(args))
