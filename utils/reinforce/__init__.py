"""REINFORCE: the loop, baselines, sampling, checkpoints. Read `loop` first."""
