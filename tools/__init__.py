"""Programs beside the assignment's: `python -m tools.hand_in` and `python -m tools.bench`."""
