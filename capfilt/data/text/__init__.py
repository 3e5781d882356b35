"""Tokenizers: texts to ids and back."""
