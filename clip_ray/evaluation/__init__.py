"""Retrieval, zero-shot classification, and the report."""
