"""What a long-lived orchestrator asks of its own process."""

from __future__ import annotations

import gc


def calm_gc() -> None:
    """Collect garbage rarely: a full collection walks every request and stops the loop for tens of milliseconds.

    What lives as long as the run is set aside now; the core makes no reference cycles, so little is left to collect.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 1000)
