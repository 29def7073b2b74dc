"""The SQLite backend: one file, one writer thread, readers beside it."""
