"""Payload codecs: compression, encryption and offload between the serializer and the storage.

What is stored says which codecs made it, in which order and with which key (``_form.py``), and
reading follows that alone; the settings decide how new payloads are written (``_chain.py``).
"""

from __future__ import annotations

from pyworkflow._codecs._chain import (
    Writer,
    describe,
    opened_events,
    opened_run,
    opened_text,
    writer_for,
)
from pyworkflow._codecs._offload import sweep_offloaded

__all__ = [
    "Writer",
    "describe",
    "opened_events",
    "opened_run",
    "opened_text",
    "sweep_offloaded",
    "writer_for",
]
