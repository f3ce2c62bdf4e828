"""Annotation files: captions, questions, splits."""
