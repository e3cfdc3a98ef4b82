"""The parts that run a step: optimizers, processes, compiled graphs."""
