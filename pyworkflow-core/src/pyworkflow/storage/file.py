"""Door to the file backend: the import path stays, whichever distribution holds the code."""

try:
    from pyworkflow_storage_file import FileStorageBackend
except ModuleNotFoundError as error:
    if error.name != "pyworkflow_storage_file":
        raise  # the plugin is there and broken: its own error says more
    raise ModuleNotFoundError(
        "the file backend is not installed: distribution=pyworkflow-storage-file; "
        "pip install 'pyworkflow-storage-file', from a clone './pyworkflow-storage-file'",
        name=error.name,
    ) from None

__all__ = ["FileStorageBackend"]
