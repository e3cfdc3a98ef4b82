"""Experiments: data streams, the run loop, reports and the command line."""
