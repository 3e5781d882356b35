"""What is asked of models: each objective is a function of tensors; `step.py` asks several in one forward pass."""
