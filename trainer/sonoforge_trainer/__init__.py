"""The trainer: shards in, checkpoints and scores out. Importing this package loads nothing."""
