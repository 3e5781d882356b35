"""How models learn: the loop, its optimizer, its processes and its checkpoints."""
