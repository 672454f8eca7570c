"""What drafts would bring while none are made: now and then all requests are looked up, and compared a while later.

The GPU counts (`gpu_kernels.compare`); the host reads what it had counted one look earlier, so that nobody waits.

Invariant: nothing is expected before `ENOUGH` drafts have been compared.
"""

from math import exp

import torch

ENOUGH = 8  # drafts
REMEMBERED = 64  # drafts of earlier looks, at most,
LOOKS = 16  # and of so many looks: a lone request is not judged for long by the many that were here before


class Outlook:
    """Tokens of a request and step that drafts would bring, if all that is found were verified."""

    def __init__(self, device: torch.device) -> None:
        self.seen = torch.zeros(2, dtype=torch.int64, device=device)  # drafts, tokens of them that came
        self._copy = torch.zeros(2, dtype=torch.int64, pin_memory=self.seen.is_cuda)
        self._before = (0, 0)
        self._drafts = self._right = 0.0

    @property
    def brings(self) -> float:
        """1.0 without a token foretold."""
        return 1.0 + self._right / self._drafts if self._drafts >= ENOUGH else 1.0

    def read(self) -> None:
        """Take in what was on its way since the last call, and send for what is counted now."""
        drafts, right = self._copy.tolist()
        new = drafts - self._before[0]
        kept = exp(-1 / LOOKS) * min(1.0, REMEMBERED / max(self._drafts, 1.0)) if new else 1.0
        self._drafts = self._drafts * kept + new
        self._right = self._right * kept + right - self._before[1]
        self._before = drafts, right
        self._copy.copy_(self.seen, non_blocking=True)
