"""Many requests on one bundle: the sequences that run at once, the pages that they share, and whose turn it is."""
