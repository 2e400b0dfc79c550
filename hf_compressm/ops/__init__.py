"""Scans and their relatives: for each op a reference in plain PyTorch, and kernels for CPUs and GPUs."""
