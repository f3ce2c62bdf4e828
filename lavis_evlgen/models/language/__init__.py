"""Frozen language models and their tokenizers."""
