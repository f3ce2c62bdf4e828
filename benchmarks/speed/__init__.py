"""Scripts that time training steps, captions and their parts."""
