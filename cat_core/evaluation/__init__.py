"""How good inpainted pictures are: metrics on features, the networks that make the features, and reports."""
