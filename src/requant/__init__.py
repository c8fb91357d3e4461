"""requant: prune, quantize, verify, evaluate, serve and describe mixture-of-experts checkpoints.

The library behind the Snakemake graph. It imports no Snakemake; one module is one idea of the field.
"""

COMPUTES = False  # a version and a docstring
__version__ = "0.1.0"
