"""``python -m pyworkflow_conformance.simulation``: the same as ``pyworkflow-sim``."""

import sys

from pyworkflow_conformance.simulation._cli import main

if __name__ == "__main__":
    sys.exit(main())
