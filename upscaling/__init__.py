"""Upscaling images: the network in its fast form, tiles, devices, which file goes where."""
