"""What the second owner of every shard costs."""
