"""Mods as programs for the native kernels: trace, lower, simplify."""
