"""A deterministic stand-in for Seer's vLLM engines: the same wire, no model, a speed and faults of your choosing.

See design/mock-engine.md. Start one with `seer mock-engine`, or in a test:

    server = MockServer(MockConfig())
    runner, url = await server.start()
    ...
    await runner.cleanup()
"""

from seer_servers.mock.config import MockConfig
from seer_servers.mock.model import LanguageModel, reference_response
from seer_servers.mock.serve import serve
from seer_servers.mock.server import MockServer
from seer_servers.mock.speed import KV, Speed

__all__ = ["KV", "LanguageModel", "MockConfig", "MockServer", "Speed", "reference_response", "serve"]
