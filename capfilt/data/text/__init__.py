"""Tokenizers, texts to ids and back; and the rules by which answers to questions are compared."""
