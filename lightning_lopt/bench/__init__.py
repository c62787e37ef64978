"""Benchmarks: `python -m lightning_lopt.bench --help`."""
