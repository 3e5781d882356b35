"""Run folders: their plan, lock, ledger of commits, counters that must balance, metrics and progress.

Nothing here knows what an image is.
"""
