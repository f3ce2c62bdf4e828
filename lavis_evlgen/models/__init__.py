"""LAVIS models and their three parts: vision encoder, connector, language model."""
