"""Where the models of a bootstrap come from."""
