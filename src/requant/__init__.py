"""requant: prune, quantize, verify, evaluate, serve and describe mixture-of-experts checkpoints.

The library behind the Snakemake graph. It imports no Snakemake; one module is one idea of the field.
"""

__version__ = "0.1.0"
