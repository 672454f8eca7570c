"""Whether counts are a sample of given probabilities."""

from __future__ import annotations

import torch

LEAST = 5  # counts expected in a cell; rarer ones are taken together


def p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Chance of counts at least as far from `probabilities` [cells], which sum to 1, by Pearson's chi-square."""
    expected = probabilities.double() * counts.sum()
    common = expected >= LEAST
    observed = torch.cat((counts[common].double(), counts[~common].sum()[None].double()))
    wanted = torch.cat((expected[common], expected[~common].sum()[None]))
    keep = wanted > 0
    statistic = float(((observed - wanted)[keep] ** 2 / wanted[keep]).sum())
    freedom = int(keep.sum()) - 1
    return float(torch.special.gammaincc(torch.tensor(freedom / 2.0), torch.tensor(statistic / 2)))
