"""The pages of copies, contamination and neighbours."""
