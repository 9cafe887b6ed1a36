"""Open captioned images: folders, tar shards, tables, `datasets`."""
