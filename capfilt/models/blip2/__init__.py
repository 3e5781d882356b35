"""BLIP-2: Q-Former, frozen language model, and transformers' config of it."""
