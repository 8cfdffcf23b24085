"""Comparisons: what finished directories say about themselves, grids of them, and the tables and pages made of it."""
