"""The mean and the largest eigenvalue of a matrix, a row a line."""
import sys

import numpy

matrix = numpy.loadtxt(sys.stdin, ndmin=2)
product = matrix @ matrix.T
print(f"{matrix.mean():.3f} {numpy.linalg.eigvalsh(product).max():.3f}")
