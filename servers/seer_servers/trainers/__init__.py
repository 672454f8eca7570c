"""Seams of trainers that are Python, not HTTP: each file answers one trainer's with calls to `seer serve`."""
