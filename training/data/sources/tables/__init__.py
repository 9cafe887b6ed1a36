"""Tables: parquet files in place or through the cache of `datasets`, save_to_disk, the hub."""
