"""The path that 0.1 had for ``pyworkflow.storekit.reference``. It goes in 0.3."""

import sys
import warnings

from pyworkflow.storekit import reference

warnings.warn(
    "pyworkflow.spi.reference is pyworkflow.storekit.reference; this path goes in 0.3",
    DeprecationWarning,
    stacklevel=2,
)
sys.modules[__name__] = reference
