"""Jobs over shards: one shard in, one committed result out."""
