"""The Triton kernels: one formula a file, each with the function that decides how it is launched.

``ila_kernels`` imports nothing from here until ``impl="triton"`` is asked for.
"""
