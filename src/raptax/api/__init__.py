"""Attention over arrays, pages, packed sequences, and sequences spread over devices."""
