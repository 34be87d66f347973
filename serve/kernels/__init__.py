"""Parts of a decoding step that run as one kernel each on a GPU, and in torch elsewhere.

Each file has a function, its twin in torch, and its Triton kernel. The step that calls them may be
captured as a CUDA graph: rows, places and lengths are read from tensors on the device, and nothing
waits for the device.
"""
