"""The training loop, the log-prob head, references, checkpoints and the order of the data."""
