"""Benchmarks that a user can rerun: arms interleaved in one run, printed as ratios."""
