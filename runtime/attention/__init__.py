"""The seam at run time: which pages a step attends to, and how they are walked."""
