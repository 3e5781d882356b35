"""The verbs of near pictures: embed, index, retrieve, dedup, decontaminate."""
