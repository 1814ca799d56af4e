"""Pictures for people: previews of visual prompts, curves, histograms and sheets of samples."""
