"""`evlgen tokens`: which picture parts each merged token stands for."""
