"""Grouped drafting between processes: the draft server, and the client that each engine has of it."""
