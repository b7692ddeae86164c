"""Sweeps over configurations."""
