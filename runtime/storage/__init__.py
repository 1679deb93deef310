"""Pages outside RAM: records, stores, and the ways to read them back."""
