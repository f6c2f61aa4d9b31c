"""Benchmarks: the only place speed is claimed from."""
