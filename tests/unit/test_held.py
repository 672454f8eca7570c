"""What comes in during a pause: numbers stay, what nobody wants is forgotten."""

from __future__ import annotations

from seer_async.events import GroupAdded, RequestsCancelled
from seer_async.held import Held
from seer_async.types import Prompt


def added(group: str, n: int) -> GroupAdded:
    return GroupAdded(prompt=Prompt(id=group, token_ids=[1, 2]), n=n, limit=10)


def names(group: str, *numbers: int) -> list[str]:
    return [f"{group}/{number}" for number in numbers]


def test_a_group_is_released_whole_and_in_order() -> None:
    held, first, second, more = Held(), added("g1", 2), added("g2", 1), added("g1", 1)
    held.add(first, names("g1", 0, 1))
    held.add(second, names("g2", 0))
    held.add(more, names("g1", 2))
    held.drop([*names("g1", 0, 1), "elsewhere/0"])
    assert held.size("g1") == 3, "what comes next keeps its number"
    assert (held.wanted, held.requests()) == (2, {"g1/2", "g2/0"})
    assert held.prompt("g1/2") == [1, 2]
    assert held.release() == [first, more, second, RequestsCancelled(requests=("g1/0", "g1/1"))]
    assert (len(held), held.wanted, held.size("g1")) == (0, 0, 0)
    assert held.release() == [RequestsCancelled(requests=())]


def test_what_nobody_wants_is_forgotten_at_once() -> None:
    held = Held()
    for number in range(100):
        held.add(added(f"g{number}", 2), names(f"g{number}", 0, 1))
        held.drop(names(f"g{number}", 0))
        assert len(held) == held.wanted == 1
        held.drop(names(f"g{number}", 0, 1))
        assert len(held) == held.wanted == held.size(f"g{number}") == 0
