"""The figures, under the name that notebook 04 uses."""

from backpack_lib.display.figures import *
