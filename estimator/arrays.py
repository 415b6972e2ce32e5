"""The type of the arrays that figures are computed on. Shapes are in the names of variables, or in docstrings."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
