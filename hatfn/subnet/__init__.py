"""One task taken out of a learner: sliced, or exported as a plain module."""
