"""Exact nearest neighbours of tokens and vectors, masked or not: FAISS or torch. The only door to FAISS."""
