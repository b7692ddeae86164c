"""Turn raw Flickr30k into shards, order them, and stream them to the workers."""
