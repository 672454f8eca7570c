"""What Seer adds to a vLLM 0.32 engine, through vLLM's own plug-in entry points.

Set `VLLM_PLUGINS=seer` on the engine: vLLM loads the HTTP routes only if they are named there.
Invariants: on an engine without speculation a request that does not carry `seer_prompt_len` is sampled exactly as
without the plug-in; a capability is advertised only by workers that have it; no failure in here stops an engine. On an
engine with speculation (Model Runner V1 with any, V2 with grouped drafts) drafts without probabilities are verified by
drawing (`verification`, `gpu_verification`), for every request: from the same distribution, but not vLLM's own draws.
"""

import logging


def register() -> None:
    """Prepare this process for its workers. vLLM calls it in every process, perhaps more than once."""
    try:
        from seer_servers.plugin.draft_stats import announce  # noqa: PLC0415 - a failure must not stop the engine
        from seer_servers.plugin.worker import hook  # noqa: PLC0415 - costs seconds where vLLM has not loaded it

        announce()
        hook()
    except Exception:
        # Without the hook the engine serves as stock vLLM does, and advertises no capability.
        logging.getLogger("vllm.seer").exception("The Seer plug-in could not be set up and stays off.")
