"""A whole cluster in one thread under one seed: clients, workers, a store, and what goes wrong.

``simulate(seed, profile)`` makes up workflow programs and a plan of faults, runs the engine's own
code on simulated time, checks the store after every change, and compares each result with that of
the undisturbed run. ``assert_holds`` is that for tests; ``pyworkflow-sim`` runs many seeds.
"""

from pyworkflow_conformance.simulation._checks import Broken
from pyworkflow_conformance.simulation._faults import PROFILES, Fault
from pyworkflow_conformance.simulation._many import assert_holds
from pyworkflow_conformance.simulation._simulate import MakeStore, Report, simulate

__all__ = ["PROFILES", "Broken", "Fault", "MakeStore", "Report", "assert_holds", "simulate"]
