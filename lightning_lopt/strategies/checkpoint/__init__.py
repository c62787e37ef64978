"""Checkpoints that hold every worker's state, so that a run goes on as if it had never stopped.

A checkpoint is Lightning's own, with the global weights as `state_dict`, and one more entry: see `entry`.
"""
