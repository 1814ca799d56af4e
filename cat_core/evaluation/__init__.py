"""How good inpainted pictures are: metrics on features, networks that make them, and reports."""
