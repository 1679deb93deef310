"""What configurations cost in quality."""
