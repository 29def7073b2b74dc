"""Door to the simulation: the import path stays, whichever distribution holds the code."""

try:
    from pyworkflow_conformance.simulation import (
        PROFILES,
        Broken,
        Fault,
        MakeStore,
        Report,
        assert_holds,
        simulate,
    )
except ModuleNotFoundError as error:
    if error.name != "pyworkflow_conformance":
        raise  # the distribution is there and broken: its own error says more
    raise ModuleNotFoundError(
        "the simulation is not installed: distribution=pyworkflow-conformance; "
        "pip install 'pyworkflow-conformance', from a clone './pyworkflow-conformance'",
        name=error.name,
    ) from None

__all__ = ["PROFILES", "Broken", "Fault", "MakeStore", "Report", "assert_holds", "simulate"]
