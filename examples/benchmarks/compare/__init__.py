"""Training curves: learned and classical outer optimizers side by side, tuned and drawn."""
