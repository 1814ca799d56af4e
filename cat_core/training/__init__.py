"""Training CAT-Diffusion: stages as data, one loop for all, batches that depend on nothing but the step."""
