"""What an engine step costs, by requests in the batch and drafted tokens: T(B, n), learned from the steps themselves.

Steps of similar batch size share a model: T = base + per_token * (B + n) + per_draft * n + jump * [n > 0]. The last two
are what speculation itself costs: verifying and sampling more rows, and the slower path that any draft switches on.
Old steps fade, so that a longer context or a busier machine is noticed. A profile taken before the first request is
where each model starts, and what it falls back to where there is little to learn from.

Invariant: predictions are positive and do not fall as drafts are added.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MEMORY = 150.0  # steps after which an old one weighs a third (1/e)
TRUST = np.array([1e-3, 3.0, 3.0, 0.3])  # how firmly each parameter is held to its start: base barely, slopes firmly
OUTLIER = 1.5  # a step this many times slower than predicted was held up by something else
WARM = 8  # steps of a model before outliers can be told
SOLVED_EVERY = 8  # steps, after the first `WARM`: what eight of them say is soon enough
_FADE = 1 - 1 / MEMORY


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


class Cost(NamedTuple):
    """Milliseconds of a step of one batch size: without drafts, and with n of them `some + each * n`."""

    none: float
    some: float
    each: float
    known: int  # drafted tokens of the largest step that was seen: what more cost is a guess

    def of(self, drafts: int) -> float:
        """Milliseconds with so many drafted tokens."""
        return self.some + self.each * drafts if drafts else self.none


class StepTime:
    """T(B, n) in milliseconds for B requests with n drafted tokens in total."""

    def __init__(self, profile: Profile | None = None) -> None:
        self.profile = profile or Profile()
        self._models: dict[int, _Model] = {}

    def learn(self, requests: int, drafts: int, milliseconds: float) -> None:
        """Take in one step in which every request decoded."""
        self._model(requests).learn(requests, drafts, milliseconds)

    def cost(self, requests: int) -> Cost:
        """What a step of so many requests is predicted to take."""
        return self._model(requests).cost(requests)

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
        self._parameters: list[float] = self._start.tolist()
        self._steps = 0
        self._known = 0
        self._heard: list[tuple[float, ...]] = []  # since the parameters were solved for: features, milliseconds

    def learn(self, requests: int, drafts: int, milliseconds: float) -> None:
        if self._steps >= WARM:
            base, per_token, per_draft, jump = self._parameters
            predicted = base + per_token * (requests + drafts) + per_draft * drafts + jump * (drafts > 0)
            milliseconds = min(milliseconds, OUTLIER * predicted)
        self._steps += 1
        self._known = max(self._known, drafts)
        self._heard.append((1.0, requests + drafts, drafts, float(drafts > 0), milliseconds))
        if self._steps <= WARM or self._steps % SOLVED_EVERY == 0:
            self._solve()

    def _solve(self) -> None:
        heard = np.array(self._heard)
        self._heard.clear()
        features, times = heard[:, :4], heard[:, 4]
        weighted = features * _FADE ** np.arange(len(heard) - 1, -1, -1)[:, None]  # an older one fades more
        kept = _FADE ** len(heard)
        self._squares = kept * self._squares + weighted.T @ features
        self._products = kept * self._products + times @ weighted
        hold = np.diag(TRUST)
        self._parameters = np.linalg.solve(self._squares + hold, self._products + hold @ self._start).tolist()

    @property
    def parameters(self) -> list[float]:
        return [round(value, 3) for value in self._parameters]

    def cost(self, requests: int) -> Cost:
        base, per_token, per_draft, jump = self._parameters
        none = max(1e-3, base + per_token * requests)
        # A drafted token costs no less than a decoded one: what few noisy steps say against that is noise.
        return Cost(none, none + max(0.0, jump), max(0.0, per_token) + max(0.0, per_draft), self._known)
