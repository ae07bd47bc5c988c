"""Engines that encode a data set's missing shards: each is a module with `run(job, on_progress)`."""
