"""capibara: train language models by consensus.

n nodes each train a model for a while; then they vote. A robust, quality-gated, quorum-checked merge turns n models
into one, and every round leaves a certificate that anyone can recheck. Importing this package loads no JAX.
"""

__version__ = "2.0.0.dev0"
