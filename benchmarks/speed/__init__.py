"""End to end speed, beside other engines: `make bench`."""
