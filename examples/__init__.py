"""Runnable examples of `lightning_lopt`."""
