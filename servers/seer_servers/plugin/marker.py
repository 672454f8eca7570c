"""The one mark by which a request asks for the plug-in: `extra_args["seer_prompt_len"]`."""

from collections.abc import Sequence
from typing import Any

SEER_PROMPT_LEN = "seer_prompt_len"


def original_prompt_len(params: Any, prompt_token_ids: Sequence[int] | None) -> int | None:
    """Length of the prompt before any response token was appended to it; None if the request has no valid mark.

    The mark comes from an HTTP client: what is not a length within the prompt counts as no mark.
    """
    extra_args = getattr(params, "extra_args", None)
    if not extra_args or prompt_token_ids is None:
        return None
    length = extra_args.get(SEER_PROMPT_LEN)
    if type(length) is not int or not 1 <= length <= len(prompt_token_ids):
        return None
    return length
