"""Rollouts at the scale of a cluster, simulated: the real core over engines with closed-form progress.

See design/simulation.md.
"""
