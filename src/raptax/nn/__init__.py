"""Layers: projections, norms, attention, and their arrays on several devices."""
