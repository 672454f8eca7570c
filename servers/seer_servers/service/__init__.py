"""`seer serve`: the fleet behind one HTTP address, which looks like one vLLM server."""
