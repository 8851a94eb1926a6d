"""Runs of ``sample`` and ``extend`` on disk: what was asked for, preset and weights, and what is finished."""
