"""Many emulations at once, and their table."""
