"""What happened: the run folder, the ledger of commits, the counters that must balance, the report.

Nothing here knows what a picture is; a room below this one may not write down what it did, it returns it.
"""
