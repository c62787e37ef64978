"""Speed and memory of the outer step, of meta-training and of the strategy itself."""
