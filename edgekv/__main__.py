"""`python -m edgekv`."""

from edgekv.cli.main import main

main()
