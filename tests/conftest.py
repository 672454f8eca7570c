"""What tests share: their order over the processes, and how many threads they compute with."""

from __future__ import annotations

import importlib.util
import os
import signal
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

# Threads of one computation wait, spinning, for the slowest: on cores that others use, two are several times slower
# than one. Torch in the tests themselves follows this; a lone engine, which gets all cores, must be told.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
os.environ |= ONE_THREAD

START_AND_TEST_S = 600  # two engines and the tests share what may be two busy cores
OF_THE_FLEET = tuple(  # also what starts an engine of its own: not while the two of the fleet are at work
    f"tests/vllm/test_{of}.py"
    for of in ("drafting", "exactness", "kvpool", "rollout", "serve", "serve_random", "control", "adapters", "trainers")
)
LONG = (
    OF_THE_FLEET,
    "tests/vllm/test_mooncake.py",
    "tests/live/",
    "tests/test_mooncake.py",
    "tests/test_fleet",
)  # begun first, in this order, so that none is alone at the end


settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")  # real engines share the cores: what took how long says nothing of the code

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job: Ctrl-C is tested all the same
    signal.signal(signal.SIGINT, signal.default_int_handler)


class _TwoLanes(LoadScopeScheduling):
    """All tests of the shared fleet go to one process, so that it starts once; the others go one by one to the rest."""

    def _split_scope(self, nodeid: str) -> str:
        return "fleet" if nodeid.startswith(OF_THE_FLEET) else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _TwoLanes(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.timeout(START_AND_TEST_S))
    items.sort(key=lambda item: _place(item.nodeid))


def _place(nodeid: str) -> tuple[int, bool]:
    """The long ones first; of the fleet's, last the test that leaves an engine killed."""
    first = next((number for number, path in enumerate(LONG) if nodeid.startswith(path)), len(LONG))
    return first, "test_a_killed_engine_costs" in nodeid


@pytest.fixture(scope="session")
def vllm_installed() -> None:
    """Require vLLM: a test suite that quietly leaves out the engines would prove nothing about them."""
    if importlib.util.find_spec("vllm"):
        return
    if os.environ.get("SEER_ALLOW_NO_VLLM") == "1":
        pytest.skip("NO REAL ENGINE WAS TESTED: vLLM is not installed and SEER_ALLOW_NO_VLLM=1 allows that")
    pytest.fail("vLLM is not installed: run `make setup`, or set SEER_ALLOW_NO_VLLM=1 to test without engines")
