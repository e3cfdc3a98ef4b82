"""How well tasks are done, which task a sample is of, who uses what."""
