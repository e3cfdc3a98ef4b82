"""What a step runs on: optimisers, processes, compiled graphs."""
