"""The Triton kernels, one module a family: imported only when a kernel is to run, never with the package."""
