"""Models of other libraries to trace, with random weights: nothing is downloaded."""
