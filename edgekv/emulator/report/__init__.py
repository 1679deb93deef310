"""A result in the terminal and as an HTML page."""
