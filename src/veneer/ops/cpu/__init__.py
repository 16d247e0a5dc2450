"""C++ back end. Each file hands tensors' addresses to `veneer._kernels`; argument checks are done by veneer.ops."""
