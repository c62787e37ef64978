"""Print the best polynomials a x + b x³ + c x⁵, each for the ends that the one before leaves: polynomials.py LEAST NUMBER."""

import sys

import numpy as np
from scipy.optimize import linprog


def best(low, high):
    """The coefficients of least error to 1 on [low, high], and that error."""
    x = np.concatenate([np.geomspace(low, high, 1500), np.linspace(low, high, 1500)])
    powers, one = np.stack([x, x**3, x**5], 1), np.ones((len(x), 1))
    rows = np.block([[powers, -one], [-powers, -one]])
    bounds = [(None, None)] * 3 + [(0, None)]
    *coefficients, error = linprog([0, 0, 0, 1], rows, np.concatenate([one, -one]).ravel(), bounds=bounds).x
    return coefficients, error


low, high = float(sys.argv[1]), 1.0
for _ in range(int(sys.argv[2])):
    coefficients, error = best(low, high)
    print([round(float(x), 4) for x in coefficients], f"error {error:.3f}")
    low, high = 1 - error, 1 + error
