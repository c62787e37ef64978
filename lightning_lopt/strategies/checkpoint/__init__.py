"""Checkpoints that hold every worker's state."""
