"""The life of a task: init, begin, consolidate, similarity, forget, grow."""
