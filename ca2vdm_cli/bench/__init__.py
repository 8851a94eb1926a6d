"""Measuring and checking: the benchmark and its baselines, cost formulas, estimates, exactness."""
