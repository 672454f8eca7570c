"""Prometheus text: figures of our own, and pages of engines merged in with a label that says whose they are."""

from __future__ import annotations

import re

_SAMPLE = re.compile(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)")
_FAMILY = re.compile(r"# (?:HELP|TYPE) (\S+)")


class Exposition:
    """A page; families keep the order in which they came."""

    def __init__(self) -> None:
        self._heads: dict[str, list[str]] = {}
        self._lines: dict[str, list[str]] = {}

    def add(self, name: str, value: float, *, kind: str, words: str, **labels: str) -> None:
        """One figure of a family."""
        self._heads.setdefault(name, [f"# HELP {name} {words}", f"# TYPE {name} {kind}"])
        self._lines.setdefault(name, []).append(f"{name}{_braced(labels)} {value}")

    def merge(self, page: str, **labels: str) -> None:
        """The figures of another page, with `labels` added; lines that are no figures are left out."""
        family, fresh = "", set[str]()
        for line in page.splitlines():
            if head := _FAMILY.match(line):
                family = head[1]
                if family not in self._heads:
                    fresh.add(family)
                if family in fresh:
                    self._heads.setdefault(family, []).append(line)
            elif sample := _SAMPLE.fullmatch(line.rstrip()):
                own = ",".join(filter(None, [_braced(labels)[1:-1], sample[2]]))
                self._lines.setdefault(family or sample[1], []).append(f"{sample[1]}{{{own}}} {sample[3]}")

    def __str__(self) -> str:
        return "".join(
            f"{line}\n" for family, lines in self._lines.items() for line in (*self._heads.get(family, ()), *lines)
        )


def _braced(labels: dict[str, str]) -> str:
    inner = ",".join(f'{name}="{value}"' for name, value in labels.items())
    return f"{{{inner}}}" if inner else ""
