"""`python -m grid.report`: see `grid.report`."""

from __future__ import annotations

from grid import options
from grid.report import main

if __name__ == "__main__":
    options.run(main)
