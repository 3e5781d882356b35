"""Losses as pure functions of embeddings, logits and labels."""
