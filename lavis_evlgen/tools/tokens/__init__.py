"""`evlgen tokens`: which picture parts each merged token stands for."""

STYLES = ("mean", "outline")  # of drawing them; here, where the parser of `evlgen` reads it without torch
