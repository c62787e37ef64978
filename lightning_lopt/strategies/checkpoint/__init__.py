"""Checkpoints that hold every worker's state, so that a run goes on as if it had never stopped.

A checkpoint is Lightning's own, with the global weights as `state_dict`, and one more entry.

* `entry`: this entry, and the versions of its layout.
* `writing`: adds every worker's part, in the same file or in files of their own.
* `worker_files`: names of these files; reading and deleting them.
* `atomic`: the default `CheckpointIO`, which writes a file as a whole or not at all.
* `resume`: going on from a checkpoint.
* `pieces`: parts of ranks that share a model, for a run that goes on with other ranks.
* `mean`: the mean of all parts, for a run that goes on with another number of workers.
"""
