import gc
import os

# torch and what else tests import make millions of objects that live to the end: going through them for garbage took most of
# the time.
gc.set_threshold(200_000, 20, 1000)
# A process of the suite for each core: more threads of torch and NumPy would only wait for each other, awake.
os.environ.setdefault("OMP_NUM_THREADS", "1")
