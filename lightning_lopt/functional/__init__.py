"""Pure functions of tensors: no state, no torch.distributed, no Lightning."""
