"""What commands leave on disk: runs, shards, and the files they are made of."""
