"""Batches of pairs for a training, in an order that is a function of the seed."""
