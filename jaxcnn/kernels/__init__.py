"""Fast kernels for the few linear operations that the rules are written in. They have no derivative rules.

`correlation` correlates images with kernels. `windows` computes maxima and sums over windows, and `bins` over windows
of nearly equal size. `dtypes` sets the accumulation dtypes, `storage` marks arrays that XLA must not recompute, and
`threads` marks products that XLA must divide between threads. Each docstring gives the sum that is computed. One
function per product picks the implementation by platform and static shape. Kernels import `jaxcnn.geometry` and nothing
else from jaxcnn.
"""
