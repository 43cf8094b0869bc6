"""Kills, power cuts and long evidence: scripts, python -m tests.stress.NAME, not pytest's."""
