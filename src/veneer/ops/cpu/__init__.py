"""The C++ kernels of `veneer._kernels`, behind torch tensors."""
