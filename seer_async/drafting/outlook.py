"""What drafting would bring, guessed while there is none: a few requests are listened to, and their text is read twice.

For each token it is asked whether the last three tokens, seen anywhere in the group before, would have said it. A run
of tokens that were foretold is what one step with a draft would have given at once. It costs about a microsecond a
token, so not more than `REQUESTS` are listened to; a duel tries drafting where the guess says that it may pay.

Invariants: memory is bounded; nothing here raises for requests or groups that are not known.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

REQUESTS, GROUPS = 8, 4  # listened to at a time; groups whose text is kept
CONTEXT = 3  # tokens
MOST_PLACES = 1 << 16  # of a group
LONGEST = 8  # tokens of a draft
ENOUGH = 128  # tokens heard before anything is expected
KEPT = 0.995  # of what was counted, at each step's end: about 200 steps are remembered

_Context = tuple[int, ...]


class Outlook:
    """Tokens of a request and step that drafts would bring; nothing is expected while little was heard."""

    def __init__(self) -> None:
        self._texts: OrderedDict[str, dict[_Context, int]] = OrderedDict()  # by group: what followed which tokens
        self._listeners: dict[str, _Listener] = {}
        self._heard = 0
        self._tokens = self._steps = 0.0

    @property
    def brings(self) -> float:
        """Tokens of a request and step, 1.0 without a token foretold."""
        return self._tokens / self._steps if self._heard >= ENOUGH else 1.0

    @property
    def requests(self) -> list[str]:
        """Those that are listened to."""
        return list(self._listeners)

    def came(self, request: str, group: str) -> None:
        """A request begins; listen to it if there is room."""
        if len(self._listeners) >= REQUESTS:
            return
        if group not in self._texts:
            if len(self._texts) >= GROUPS and not self._forget():
                return
            self._texts[group] = {}
        self._texts.move_to_end(group)
        self._listeners[request] = _Listener(group, self._texts[group])

    def left(self, request: str) -> None:
        """A request has ended. Its group's text stays for siblings that come."""
        self._listeners.pop(request, None)

    def heard(self, request: str, tokens: Sequence[int]) -> None:
        """A request's next tokens."""
        listener = self._listeners.get(request)
        if listener is None:
            return
        self._heard += len(tokens)
        for token in tokens:
            if not listener.foretold(token):  # a step's first token
                self._tokens *= KEPT
                self._steps = self._steps * KEPT + 1
            self._tokens += 1

    def _forget(self) -> bool:
        """Let go of the oldest group that nobody belongs to; whether there was one."""
        running = {listener.group for listener in self._listeners.values()}
        for group in self._texts:
            if group not in running:
                del self._texts[group]
                return True
        return False


class _Listener:
    def __init__(self, group: str, text: dict[_Context, int]) -> None:
        self.group = group
        self._text = text
        self._last: deque[int] = deque(maxlen=CONTEXT)
        self._run = 0

    def foretold(self, token: int) -> bool:
        """Whether a draft would have said this token after those before it."""
        context = tuple(self._last)
        known = self._text.get(context) == token and self._run < LONGEST
        self._run = self._run + 1 if known else 0
        if len(context) == CONTEXT:
            if len(self._text) >= MOST_PLACES:
                self._text.clear()
            self._text[context] = token
        self._last.append(token)
        return known
