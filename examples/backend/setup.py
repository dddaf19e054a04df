"""What pyproject.toml cannot say: the kernel is compiled, into a library that backend.py loads."""

from setuptools import Extension, setup

setup(ext_modules=[Extension("own_kernel._head", ["own_kernel/head.c"], extra_compile_args=["-O3"])])
