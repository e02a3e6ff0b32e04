"""Fast arithmetic: the few products the backward rules speak in.  No derivatives here.

`correlation` correlates pictures with patches, `windows` takes maxima and sums of windows, `bins` of windows of nearly
equal size; `dtypes` says what sums are taken in, `storage` what XLA is not to compute twice, `threads` what it is to
divide.  What each computes is the sum in its docstring; how, is chosen by platform and static shape in one visible
place a product.  Rooms: kernels import `jaxcnn.geometry` and nothing else of jaxcnn.
"""
