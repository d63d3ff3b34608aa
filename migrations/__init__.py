"""The schema as a chain of additive steps, the same for every shard."""
