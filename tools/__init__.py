"""Programs that make what the repository holds. Run them from its root, with `python -m`."""
