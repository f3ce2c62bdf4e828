"""The commands of `evlgen`, one module or folder each."""
