"""bootstrap: rounds of annotate, select, pretrain and evaluate."""
