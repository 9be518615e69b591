"""Strict runs of notebooks, grids of them, and pages. It needs no model."""
