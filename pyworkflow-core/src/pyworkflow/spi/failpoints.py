"""The path that 0.1 had for ``pyworkflow.storekit.failpoints``. It goes in 0.3."""

import sys
import warnings

from pyworkflow.storekit import failpoints

warnings.warn(
    "pyworkflow.spi.failpoints is pyworkflow.storekit.failpoints; this path goes in 0.3",
    DeprecationWarning,
    stacklevel=2,
)
sys.modules[__name__] = failpoints
