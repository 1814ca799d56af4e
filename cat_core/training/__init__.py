"""Training CAT-Diffusion: stages as data, one loop for all, batches that follow from the step."""
