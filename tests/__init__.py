import gc

# torch and what else tests import make millions of objects that live to the end: going through them for garbage took most of
# the time.
gc.set_threshold(200_000, 20, 1000)
