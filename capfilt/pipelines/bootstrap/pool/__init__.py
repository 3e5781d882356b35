"""The data of a bootstrap."""
