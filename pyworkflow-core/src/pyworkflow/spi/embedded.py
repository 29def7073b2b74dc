"""The path that 0.1 had for ``pyworkflow.storekit.embedded``. It goes in 0.3."""

import sys
import warnings

from pyworkflow.storekit import embedded

warnings.warn(
    "pyworkflow.spi.embedded is pyworkflow.storekit.embedded; this path goes in 0.3",
    DeprecationWarning,
    stacklevel=2,
)
sys.modules[__name__] = embedded
