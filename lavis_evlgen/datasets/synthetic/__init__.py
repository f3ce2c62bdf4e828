"""Drawn pictures and clips with captions."""
