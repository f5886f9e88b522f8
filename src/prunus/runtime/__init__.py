"""The compiled runtime: kernels for packed matrices and the decode loop. Nothing is loaded by importing it."""
