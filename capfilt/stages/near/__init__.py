"""Jobs that find near pictures: vectors, pairs, copies, an index."""
