"""Engines that somebody else has paused."""

from seer_async.events import EngineHeld

from .hand import Hand


def test_what_a_held_engine_works_on_goes_elsewhere_and_comes_back() -> None:
    hand = Hand("a", "b", rollout={"chunk_size": 10}).up().groups("g")
    busy = hand.engine_of["g/0"]
    other = {"a": "b", "b": "a"}[busy]
    hand.post(EngineHeld(engine=busy, held=True))
    assert hand.engine_of == {"g/0": other}
    assert hand.core.retries == 0
    hand.post(EngineHeld(engine=other, held=True))
    assert hand.engine_of == {}
    hand.post(EngineHeld(engine=busy, held=False))
    assert hand.engine_of == {"g/0": busy}


def test_patience_is_for_engines_that_are_gone() -> None:
    hand = Hand("a", engine={"patience_s": 5.0}).up().groups("g")
    hand.post(EngineHeld(engine="a", held=True))
    hand.wake(100)
    assert hand.stopped is None
    hand.down("a")
    hand.wake(200)
    assert hand.stopped == "no_engine"


def test_a_new_process_is_not_held() -> None:
    hand = Hand("a").up().groups("g")
    hand.post(EngineHeld(engine="a", held=True))
    hand.down("a")
    hand.up(boot="2")
    assert hand.engine_of == {"g/0": "a"}
