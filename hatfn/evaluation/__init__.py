"""Accuracy and metrics, the inference of a sample's task, and the use of units and memory."""
