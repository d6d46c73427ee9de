"""Upscaling of images: fast network, tiles, device and precision, input and output files, processes."""
