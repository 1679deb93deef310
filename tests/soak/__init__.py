"""Thirty minutes of everything at once: `make soak`, or `python -m tests.soak --minutes N`.

One process does rounds with random options, one after the other, and starts others that it kills. Each round compares the
text with that of a run that nobody disturbed; memory, threads, descriptors and files of the process must be flat at the end. It
stands beside the tests, since it can only pass or fail, and is none of them, since it takes half an hour.
"""
