"""What the benchmark has to offer, for its command line; imports nothing."""

SECTIONS = {
    "operations": "multiplications of a step and of SemInpainter, counted",
    "step": "a step of the sampler: plain, RefAdapter as in the official code, "
    "RefAdapter as shipped",
    "adapter": "the RefAdapters of a step alone, and the memory bandwidth they need",
    "image": "a whole picture, from photo and mask to pixels",
    "sem-inpainter": "what happens once a picture: CLIP, SemInpainter, folding",
    "growth": "a step at other sizes, batches, adapters and prompts",
    "compile": "a step with torch.compile",
    "kernels": "GPU kernels of a step",
    "profile": "the RefAdapters of a step by operator, from the official form to the shipped one",
    "loading": "a full checkpoint, in fresh processes",
    "training": "a step of one picture in the first two training stages, fp32, "
    "recomputing activations, with and without a cache, and what of it is waiting; how fast "
    "samples come by number of workers; memory over many shards",
}

# glibc: keep what is freed. Else it goes back to the system or not by luck, and a step on a CPU
# took 8 % longer.
STEADY_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_MMAP_THRESHOLD_": str(2**32)}
