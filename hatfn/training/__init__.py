"""One step of training, for one state and for several at once."""
