"""Open captioned images: folders, tar shards, parquet files, data sets of the hub."""
