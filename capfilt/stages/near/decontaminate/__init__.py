"""decontaminate: which samples of a pool are copies of held-out pictures, or have a held-out text.

First the held-out shards are described (`held_out`), with copies of some pictures, on which the self-test shows what
would be found (`self_test`). Then the pool is compared shard by shard, by its embeddings (`near`) and, for texts and
where there are no embeddings, by reading it (`exact`). Held-out sets fit into memory and are compared in full.
"""
