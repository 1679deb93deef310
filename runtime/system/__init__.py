"""The machine and this process, as the operating system tells of them."""
