"""Reward models: losses, training, scoring, the held-out ensemble."""
