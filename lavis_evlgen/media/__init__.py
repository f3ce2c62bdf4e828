"""Files of pictures and clips, and what can be wrong with a file; used by every other folder."""
