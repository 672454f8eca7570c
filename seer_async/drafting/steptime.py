"""What an engine step costs, by requests in the batch and drafted tokens: T(B, n), learned from the steps themselves.

Steps of similar batch size share a model: T = base + per_token * (B + n) + per_draft * n + jump * [n > 0]. The last two
are what speculation itself costs: verifying and sampling more rows, and the slower path that any draft switches on.
Old steps fade, so that a longer context or a busier machine is noticed. A profile taken before the first request is
where each model starts, and what it falls back to where there is little to learn from.

Invariant: predictions are positive and do not fall as drafts are added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MEMORY = 150.0  # steps after which an old one weighs a third (1/e)
TRUST = np.array([1e-3, 3.0, 3.0, 0.3])  # how firmly each parameter is held to its start: base barely, slopes firmly
OUTLIER = 1.5  # a step this many times slower than predicted was held up by something else
WARM = 8  # steps of a model before outliers can be told
SOLVED_EVERY = 8  # steps, after the first `WARM`: what eight of them say is soon enough


class Profile(NamedTuple):
    """Milliseconds of a step of B tokens: `base + per_token * B`."""

    base: float = 20.0
    per_token: float = 1.0

    @classmethod
    def fit(cls, points: list[tuple[int, float]]) -> Profile:
        """The line through measured (tokens, milliseconds)."""
        tokens, milliseconds = zip(*points, strict=True)
        slope, base = np.polyfit(tokens, milliseconds, 1)
        return cls(max(0.0, float(base)), max(1e-4, float(slope)))


class StepTime:
    """T(B, n) in milliseconds for B requests with n drafted tokens in total."""

    def __init__(self, profile: Profile | None = None) -> None:
        self.profile = profile or Profile()
        self._models: dict[int, _Model] = {}

    def learn(self, requests: int, drafts: int, milliseconds: float) -> None:
        """Take in one step in which every request decoded."""
        self._model(requests).learn(requests, drafts, milliseconds)

    def curve(self, requests: int, drafts: int) -> NDArray[np.float64]:
        """Predicted milliseconds for 0, 1, ... `drafts` drafted tokens."""
        return self._model(requests).curve(requests, drafts)

    def parameters(self) -> dict[str, list[float]]:
        """Base, per_token, per_draft and jump in milliseconds, for each range of batch sizes, by its lower end."""
        return {str(1 << (bucket - 1)): model.parameters for bucket, model in sorted(self._models.items())}

    def _model(self, requests: int) -> _Model:
        bucket = requests.bit_length()
        if bucket not in self._models:
            self._models[bucket] = _Model(self.profile)
        return self._models[bucket]


class _Model:
    """The four parameters for one range of batch sizes, by fading, regularised least squares."""

    def __init__(self, profile: Profile) -> None:
        self._start = np.array([profile.base, profile.per_token, 0.0, 0.0])
        self._squares = np.zeros((4, 4))
        self._products = np.zeros(4)
        self._parameters = self._start
        self._steps = 0

    def learn(self, requests: int, drafts: int, milliseconds: float) -> None:
        features = np.array([1.0, requests + drafts, drafts, float(drafts > 0)])
        if self._steps >= WARM:
            milliseconds = min(milliseconds, OUTLIER * float(features @ self._parameters))
        self._steps += 1
        fade = 1 - 1 / MEMORY
        self._squares = self._squares * fade + np.outer(features, features)
        self._products = self._products * fade + features * milliseconds
        if self._steps <= WARM or self._steps % SOLVED_EVERY == 0:
            hold = np.diag(TRUST)
            self._parameters = np.linalg.solve(self._squares + hold, self._products + hold @ self._start)

    @property
    def parameters(self) -> list[float]:
        return [round(float(value), 3) for value in self._parameters]

    def curve(self, requests: int, drafts: int) -> NDArray[np.float64]:
        base, per_token, per_draft, jump = self._parameters
        count = np.arange(drafts + 1)
        # A drafted token costs no less than a decoded one: what few noisy steps say against that is noise.
        each = max(0.0, per_token) + max(0.0, per_draft)
        times = base + per_token * requests + each * count + max(0.0, jump) * (count > 0)
        result: NDArray[np.float64] = np.maximum(times, 1e-3)
        return result
