"""Doctests are collected from every module, and some import what is optional."""

from importlib.util import find_spec

collect_ignore_glob = [
    path
    for package, path in (
        ("triton", "ila_kernels/kernels/*"),
        ("bitsandbytes", "ila/models/quantized.py"),
        ("axolotl", "ila/plugins/axolotl.py"),
    )
    if find_spec(package) is None
]
