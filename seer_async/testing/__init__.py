"""Public test kit: the core under a virtual clock, with engines that fail on purpose. See design/testing.md."""

from seer_async.testing.audit import Audit
from seer_async.testing.clock import VirtualClock
from seer_async.testing.cost import CostModel, LinearCost
from seer_async.testing.engine import SimulatedEngine
from seer_async.testing.faults import Fault, FaultKind, Faults, Mishap, random_faults
from seer_async.testing.lasting import LastingWorld, Wish, WishKind
from seer_async.testing.model import Generated, Model
from seer_async.testing.reference import Reference
from seer_async.testing.work import Work
from seer_async.testing.world import World

__all__ = [
    "Audit",
    "CostModel",
    "Fault",
    "FaultKind",
    "Faults",
    "Generated",
    "LastingWorld",
    "LinearCost",
    "Mishap",
    "Model",
    "Reference",
    "SimulatedEngine",
    "VirtualClock",
    "Wish",
    "WishKind",
    "Work",
    "World",
    "random_faults",
]
