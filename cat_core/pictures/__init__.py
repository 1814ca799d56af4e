"""Pictures for people: previews of visual prompts, curves, histograms and sheets of samples.

And pictures as tensors: their levels, and crops of large ones.
"""
