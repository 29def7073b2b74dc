"""When the event loop may write by itself: see ``pyworkflow.spi.embedded``."""

from pyworkflow.spi.embedded import Pace

__all__ = ["Pace"]
