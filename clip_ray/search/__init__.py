"""Search indexed images by a sentence or an image."""
