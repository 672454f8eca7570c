"""Drafting as tables, of heads and rows of text, whatever they are written in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seer_async.report.words import count, number, share, visible

if TYPE_CHECKING:
    from seer_async.report.drafts import Drafts

_POSITIONS = ("Accepted: 1st", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th")
_ENGINES = 50
_EACH = 5  # groups from either end

Table = tuple[list[str], list[list[str]]]


def drafter_table(drafts: Drafts) -> Table:
    """The engines: what a step brought and took, what was switched off, and acceptance by position."""
    positions = min(len(_POSITIONS), max(len(engine.acceptance) for engine in drafts.engines))
    heads = ["Engine", "Tokens a step", "Drafter, ms", "Of the time", "Steps", "Off", "Switch-offs"]
    rows = [
        [
            visible(e.name), number(e.tokens_per_step), number(e.step_ms), share(e.time_share), count(e.steps),
            share(e.off_share), count(e.switch_offs),
            *(share(e.acceptance[i] if i < len(e.acceptance) else None) for i in range(positions)),
        ]
        for e in drafts.engines[:_ENGINES]
    ]  # fmt: skip
    return [*heads, *_POSITIONS[:positions]], rows


def draft_group_table(drafts: Drafts) -> Table:
    """The best groups and the worst, by the share of drafted tokens that was accepted."""
    groups = drafts.groups
    shown = groups if len(groups) <= 2 * _EACH else [*groups[:_EACH], *groups[-_EACH:]]
    rows = [[visible(g.id), share(g.share), number(g.length), count(g.drafted), count(g.accepted)] for g in shown]
    name = "Group" if len(shown) == len(groups) else f"Best and worst of {len(groups):,} groups"
    return [name, "Share accepted", "Tokens a draft", "Drafted", "Accepted"], rows
