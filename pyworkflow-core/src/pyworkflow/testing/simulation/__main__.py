"""``python -m pyworkflow.testing.simulation``: the same as ``pyworkflow-sim``."""

import sys

from pyworkflow.testing.simulation._cli import main

if __name__ == "__main__":
    sys.exit(main())
