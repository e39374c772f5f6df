"""Chaos: real processes under random faults, and what became of every run (`make chaos`)."""
