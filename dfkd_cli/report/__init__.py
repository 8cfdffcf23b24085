"""Comparisons: what finished directories say about themselves, and the tables and pages made of it."""
