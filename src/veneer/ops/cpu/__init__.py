"""C++ back end. Each file passes addresses of tensors to `veneer._kernels`; `veneer.ops` checks arguments."""
