"""`evlgen demo`: a page in the browser where a trained model looks at pictures and clips. docs/demo.md."""
