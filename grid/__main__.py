"""`python -m grid COMMAND ...` is `finegrid COMMAND ...`."""

from grid.cli import main

main()
