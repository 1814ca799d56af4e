"""Training beyond the loop in cat_core: one stage as a command runs it, and its data."""
