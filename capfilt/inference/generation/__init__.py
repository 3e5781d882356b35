"""Writing texts token by token: greedy, nucleus sampling, beam search."""
