"""What runs beside the engines: the vLLM plug-in, local fleets, the default model, the mock engine."""
