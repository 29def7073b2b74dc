"""Who waits for news: see ``pyworkflow.spi.embedded``."""

from pyworkflow.spi.embedded import Watchers

__all__ = ["Watchers"]
