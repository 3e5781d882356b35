"""BLIP-2: Q-Former, frozen language model, and the checkpoints of transformers and of LAVIS."""
