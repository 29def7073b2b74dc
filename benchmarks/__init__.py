"""What the engine costs on this machine: ``python -m benchmarks``. Asserts nothing."""
