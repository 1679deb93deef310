"""The flash tier: `make bench-flash`."""
