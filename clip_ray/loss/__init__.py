"""Contrastive losses over the global batch."""
