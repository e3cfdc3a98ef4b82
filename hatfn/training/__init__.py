"""The training step, for one state and for several at once."""
