"""Private parts of numpy."""

from numpy.random import bit_generator

# numpy 1.26, 2.4: a bit generator takes its first state from such an object; the public SeedSequence makes its own.
ISeedSequence = bit_generator.ISeedSequence
