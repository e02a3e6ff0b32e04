"""Fast kernels for the few linear operations that the rules are written in. They have no derivative rules.

- `correlate`, `input_grad` and `kernel_grad` are the three products of a convolution layer. `lowering` has what their
  lowerings share; `unrolled` and `winograd` are lowerings of all three.
- `fourier` correlates two signals. `per_example` computes one weight gradient, or its norm, per example.
- `windows` computes maxima and sums over windows, `adaptive` over windows of nearly equal size, and `moments` their
  means and variances. `reductions` computes sums whose terms are computed on the fly.
- `dtypes` sets the accumulation dtypes, and `shapes` compares sizes that may be symbolic.
- `materialize` marks arrays that XLA must not recompute, `parallel` products that XLA must divide between threads, and
  `split` dims that XLA must not shard.

Each docstring gives the sum that is computed. One ``choose_…`` function per product picks the implementation by
platform and static shape; `jaxcnn.platforms` traces it when the program is lowered. Kernels import `jaxcnn.platforms`
and `jaxcnn.geometry`, and nothing else from jaxcnn.
"""
