"""Token shards: encoded images with their captions on disk."""
