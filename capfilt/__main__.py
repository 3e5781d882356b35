"""`python -m capfilt`, the same program as the `capfilt` command."""

from __future__ import annotations

from capfilt.cli import main

if __name__ == "__main__":
    main()
