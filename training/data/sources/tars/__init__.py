"""Webdataset tar shards, their indexes, and compressed ones."""
