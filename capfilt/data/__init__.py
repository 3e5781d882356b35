"""What flows: samples, shards, annotations, images and tokens.

Importing this room imports none of its modules.
"""
