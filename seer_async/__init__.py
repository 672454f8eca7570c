"""Seer: a strictly on-policy rollout engine for RL on fleets of vLLM servers.

The package never imports vLLM: engines are reached over HTTP, token ids in and token ids out.
"""

__version__ = "0.1.0"
