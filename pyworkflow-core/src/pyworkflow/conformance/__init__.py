"""The suite that decides whether a storage backend is right. Runs on pytest, needs no plugin.

Subclass ``StorageConformance`` in a test module and say how a store is made; every check comes
with the class. Needs ``pip install pyworkflow-core[conformance]``.
"""

import pytest

# The checks are plain asserts: failures must show what they compared.
pytest.register_assert_rewrite(
    *(
        f"{__name__}.{module}"
        for module in ("_case", "_claims", "_contract", "_keys", "_races", "_turns", "_values")
    )
)

from pyworkflow.conformance.storage import StorageConformance  # noqa: E402 - after the hook

__all__ = ["StorageConformance"]
