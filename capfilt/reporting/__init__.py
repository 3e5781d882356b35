"""The HTML page of a run: its figures, its gallery, and the review of texts by people."""
