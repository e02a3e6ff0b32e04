"""Convolutions in oneDNN, an optional C++ library for x86 CPUs.

    pip install "jaxcnn[onednn]"
    python -m jaxcnn.native build

The second command needs a C++ compiler. Without it, jaxcnn uses its kernels in JAX. With it, `kernels.onednn` decides
which products oneDNN computes: float32 on one CPU device. The environment variable ``JAXCNN_NATIVE=0`` turns it off for
functions that are traced afterwards. Exported programs never call the library.
"""
