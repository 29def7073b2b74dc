"""What a fork does to connections: see ``pyworkflow.spi.embedded``."""

from pyworkflow.spi.embedded import add_forkable

__all__ = ["add_forkable"]
