"""How long responses are going to be: what the run has shown, as a distribution for each group.

The logarithm of a length is normal within a group, with the run's `spread` about the group's mean; these means are
normal too, over the run's groups. A response that ended says where its group's mean is; one that is still going, or was
cut off at its limit, says that its length is at least what it has generated; one that has not started says nothing.
So the short responses, which end first, do not make the others look short.

The three numbers that describe a run (`Shape`) are those under which what its groups have shown is most likely, held to
`PRIOR` while little is known. They are looked for on a grid below the limit, which grows with it. Invariants: all
lengths are in tokens; no length is above its limit; the same evidence gives the same belief; a higher limit takes away
nothing that was learned.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_LOGISTIC = 1.702  # the logistic curve of this slope is nearly the normal distribution's


class Shape(NamedTuple):
    """The lengths of a run, as logarithms: the groups' means, relative to the limit's, and the spread within one."""

    centre: float
    width: float
    spread: float


PRIOR = Shape(-1.7, 1.0, 0.25)
_FIRMNESS = Shape(1.0, 0.7, 0.7)  # standard deviations of the prior: of the centre, and of the others' logarithms
_NEVER = 1e-300  # a chance this small is none
_DEEPER = 1.5  # by which grids grow: a multiple of the steps of all of them
_WIDTHS = (0.3, 0.5, 0.75, 1.0, 1.4)
_SPREADS = (0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.7, 1.0)


class Evidence(NamedTuple):
    """What a group's responses have shown, in tokens: lengths of those that ended, and what others have generated."""

    ended: tuple[int, ...]
    going: tuple[int, ...]


class Belief:
    """Lengths under a limit."""

    def __init__(self, limit: int) -> None:
        self._taught = False
        self._lay(limit, 0)
        self._take(PRIOR)

    def extend(self, limit: int) -> None:
        """Lengths may be up to this limit, a higher one, from now on; what was learned stays."""
        if not self._taught:
            self._lay(limit, 0)
            self._take(PRIOR)
            return
        top, lowest = self._top, max(0.0, self._means[0])  # no mean is below one token
        self._lay(limit, max(0, math.ceil((math.log(limit) - 5 - lowest) / _DEEPER)))
        self._take(self.shape._replace(centre=self.shape.centre + top - self._top))

    def _lay(self, limit: int, deeper: int) -> None:
        """Lay the grids below a limit, some steps of `_DEEPER` deeper than is usual."""
        top, low = math.log(limit), _DEEPER * deeper
        self.limit = limit
        self._top = top
        self._means = np.linspace(top - 5 - low, top + 1, 41 + 10 * deeper)
        self._logs = np.linspace(top - 6 - low, top + 2, 81 + 15 * deeper)
        self._centres = np.arange(-3.5 - low, 0.26, 0.25)
        self._bounds = self._logs - (self._logs[1] - self._logs[0]) / 2  # where the grid's lengths begin

    def learn(self, groups: Sequence[Evidence]) -> None:
        """Fit the shape to all that is known; costs some ten milliseconds for 128 groups."""
        owners = np.array([i for i, group in enumerate(groups) for _ in itertools.chain(*group)])
        values = np.log([value for group in groups for value in itertools.chain(*group)])
        ended = np.array([kind for group in groups for kind in [True] * len(group.ended) + [False] * len(group.going)])
        candidates = [(centre, width) for centre in self._centres for width in _WIDTHS]
        priors = np.exp(np.array([_normal(self._means - self._top - centre, width) for centre, width in candidates]).T)
        priors /= priors.sum(axis=0)
        best: tuple[float, Shape] | None = None
        for spread in _SPREADS:
            likelihoods = np.zeros((len(groups), len(self._means)))
            np.add.at(likelihoods, owners, self._likelihoods(values, ended, spread))
            peaks = likelihoods.max(axis=1, keepdims=True)
            totals = (np.log(np.exp(likelihoods - peaks) @ priors + 1e-300) + peaks).sum(axis=0)
            for (centre, width), total in zip(candidates, totals, strict=True):
                shape = Shape(float(centre), width, spread)
                score = float(total) + _prior(shape)
                if best is None or score > best[0]:
                    best = score, shape
        assert best is not None
        self._taught = True
        self._take(best[1])

    def chances(self, group: Evidence) -> Floats:
        """Chances of the grid's lengths for a response of the group."""
        logs = self._prior
        if group.ended or group.going:
            values = np.log(group.ended + group.going)
            ended = np.arange(len(values)) < len(group.ended)
            logs = logs + self._likelihoods(values, ended, self.shape.spread).sum(axis=0)
        chances = np.exp(logs - logs.max())
        result: Floats = (chances / chances.sum()) @ self._kernel
        return result

    def remainders(self, group: Evidence, generated: Sequence[int], limit: int, chance: float) -> Floats:
        """Tokens that responses of the group have left after so many generated: exceeded with this chance alone."""
        reached = np.log(np.maximum(self.chances(group)[::-1].cumsum()[::-1], _NEVER))  # at least so long, for bounds
        alive = np.interp(np.log(np.maximum(generated, 1)), self._bounds, reached)
        lengths = np.exp(np.interp(-alive - math.log(chance), -reached, self._bounds))
        result: Floats = np.maximum(np.minimum(lengths, limit) - generated, 0.0)
        return result

    def _take(self, shape: Shape) -> None:
        self.shape = shape
        self._prior = _normal(self._means - self._top - shape.centre, shape.width)
        kernel = np.exp(_normal(self._logs - self._means[:, None], shape.spread))
        self._kernel = kernel / kernel.sum(axis=1, keepdims=True)  # of the grid's lengths (columns), for each mean

    def _likelihoods(self, values: Floats, ended: NDArray[np.bool_], spread: float) -> Floats:
        """Of each logarithm (rows) for each mean of its group."""
        distance = (values[:, None] - self._means) / spread
        rows = np.empty_like(distance)
        rows[ended] = -0.5 * distance[ended] ** 2 - math.log(spread)
        rows[~ended] = -np.logaddexp(0.0, _LOGISTIC * distance[~ended])
        return rows


def _normal(distance: Floats, deviation: float) -> Floats:
    result: Floats = -0.5 * (distance / deviation) ** 2
    return result


def _prior(shape: Shape) -> float:
    centre = (shape.centre - PRIOR.centre) / _FIRMNESS.centre
    width = math.log(shape.width / PRIOR.width) / _FIRMNESS.width
    spread = math.log(shape.spread / PRIOR.spread) / _FIRMNESS.spread
    return -0.5 * (centre**2 + width**2 + spread**2)
