"""The same workloads on this engine and on others, side by side: ``python -m benchmarks.peers``."""
