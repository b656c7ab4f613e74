"""Doctests are collected from every module, and those of the kernels import Triton."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["ila_kernels/kernels/*"]
