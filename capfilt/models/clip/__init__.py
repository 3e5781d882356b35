"""CLIP: its model, and its checkpoints in the layouts of transformers, open_clip and OpenAI."""
