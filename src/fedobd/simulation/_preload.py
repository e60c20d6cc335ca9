"""What every worker needs, imported once by the process that workers are forked from.

It is imported by nobody else; what is compiled or set up here is so in each worker at once.
"""

import numpy as np
import torch._dynamo  # noqa: F401 - the first step of an optimizer imports it

import fedobd.simulation._worker  # noqa: F401
from fedobd.codec import kernels

kernels.is_finite(np.zeros(1, np.float32))  # the first compiled loop sets numba up
