"""Programs that measure; nothing here is part of the package. Run them from the root of the repository, with `python -m`."""
