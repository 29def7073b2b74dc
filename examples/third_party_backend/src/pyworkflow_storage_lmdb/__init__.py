"""PyWorkflow storage in LMDB: one file, transactions, any number of processes on one machine."""

from pyworkflow_storage_lmdb._backend import LmdbStorageBackend

__all__ = ["LmdbStorageBackend"]
