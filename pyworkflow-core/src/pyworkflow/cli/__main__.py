"""``python -m pyworkflow.cli``, where the script ``pyworkflow`` is not on the path."""

from pyworkflow.cli import main

if __name__ == "__main__":
    main()
