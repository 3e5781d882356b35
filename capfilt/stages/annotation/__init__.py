"""Jobs that write texts and scores for the pictures of shards."""
