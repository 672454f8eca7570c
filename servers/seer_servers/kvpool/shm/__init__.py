"""The embedded KV pool: content-addressed blocks in shared memory, for all engines of one host.

`store` holds the blocks, `ledger` the counters, `janitor` the capacity; `connector` puts vLLM on top. Only the last
two sides (`connector`, `scheduler_side`, `worker_side`, `fingerprint`) need vLLM.
"""
