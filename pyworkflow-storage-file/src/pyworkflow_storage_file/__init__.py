"""Storage in one directory: a journal with checksums, shared by the processes of one machine."""

from pyworkflow_storage_file._backend import FileStorageBackend

__all__ = ["FileStorageBackend"]
