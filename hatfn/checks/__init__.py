"""Checks of the arguments of public functions, and warnings."""
