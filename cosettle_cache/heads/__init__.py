"""Trained projections: what they compute, their files, and the kinds of tokens (raw, projected) asked for."""
