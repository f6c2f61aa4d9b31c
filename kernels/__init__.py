"""Triton kernels: one operator a file, each checked against its plain definition.

Installed as `normwear_fast.kernels`. Importing this package loads no Triton; the modules in it do.
"""
