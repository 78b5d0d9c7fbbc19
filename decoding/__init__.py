"""What evaluate.py, generate.py and distill.py need: draft trees, the decoder and its kernels, acceptance."""
