"""The `seer` command line."""
