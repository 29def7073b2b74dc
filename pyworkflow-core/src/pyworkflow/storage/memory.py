"""Door to the memory backend, which comes with the core."""

from pyworkflow._memory import MemoryStorageBackend

__all__ = ["MemoryStorageBackend"]
