"""The global KV cache pool: KV blocks that any engine of a fleet can load instead of computing them again."""
