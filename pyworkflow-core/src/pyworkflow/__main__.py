"""``python -m pyworkflow``: the command line, for a Python whose scripts are not on PATH."""

from pyworkflow.cli import main

if __name__ == "__main__":
    main()
