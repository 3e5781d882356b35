"""How models answer: captions and scores for whole shards, exact and without doing work twice."""
