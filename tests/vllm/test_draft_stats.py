"""The drafter's page of counts: who writes it, and what becomes of the engine when nobody can."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm", reason="the plug-in runs inside vLLM")

from seer_servers.drafting.client import DraftClient
from seer_servers.plugin import draft_stats
from seer_servers.plugin.draft_routes import DraftMetrics
from seer_servers.plugin.draft_stats import STATS_ENV, Publisher, read_page

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is logged; pages are due always."""
    logged: list[Any] = []
    monkeypatch.setattr(draft_stats, "logger", SimpleNamespace(warning=lambda *told: logged.append(told)))
    monkeypatch.setattr(draft_stats, "PUBLISH_S", 0.0)
    return logged


def test_the_page_is_of_the_process_that_came_first(
    warnings: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks inherit the same name; they would write over each other's counts, which then would fall."""
    monkeypatch.setenv(STATS_ENV, str(tmp_path / "page" / "stats.json"))
    first = Publisher()
    for steps in (1, 2):
        assert first.due()
        first.publish({"steps": steps})
        in_a_child(lambda: Publisher().publish({"steps": 99}))
        assert read_page() == {"steps": steps}
    assert not warnings


def test_the_page_of_a_process_that_ended_goes_to_the_next(
    warnings: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STATS_ENV, str(tmp_path / "page" / "stats.json"))
    in_a_child(lambda: Publisher().publish({"steps": 99}))
    assert read_page() == {"steps": 99}
    Publisher().publish({"steps": 1})
    assert read_page() == {"steps": 1}


def in_a_child(what: Any) -> None:
    child = os.fork()
    if not child:
        what()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_page_that_cannot_be_written_is_told_once(
    warnings: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()  # also root cannot have a folder here
    monkeypatch.setenv(STATS_ENV, str(tmp_path / "file" / "page" / "stats.json"))
    publisher = Publisher()
    for _ in range(3):
        assert publisher.due()
        publisher.publish({"steps": 1})
    assert len(warnings) == 1


def test_without_an_api_process_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STATS_ENV, raising=False)
    assert not Publisher().due()
    assert read_page() is None


def test_what_may_fall_is_a_gauge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prometheus takes a counter that falls for an engine that has started anew."""
    monkeypatch.setenv(STATS_ENV, str(tmp_path / "page" / "stats.json"))
    falls = {"groups", "tokens", "bytes", "references", "sync_connected", "sync_groups", "sync_bytes"}
    client = DraftClient("tcp://127.0.0.1:1", name="test")  # it starts with its first use
    page = {"steps": 1, "groups_forgotten": 1} | dict.fromkeys(falls, 1) | client.stats()
    Publisher().publish(page)
    kinds = {metric.name: metric.type for metric in DraftMetrics().collect()}
    assert {name for name in page if kinds[f"seer:draft_{name}"] == "gauge"} == falls
