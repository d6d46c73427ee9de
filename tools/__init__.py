"""Programs that the assignment does not ask for: `python -m tools.hand_in` and `python -m tools.bench`."""
