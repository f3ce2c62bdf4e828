"""`evlgen macs` and `evlgen estimate`: what a run costs."""
