"""Swapped tokens and the structure of documents as what a text encoder learns from."""
