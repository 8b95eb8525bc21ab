"""The Triton kernels and launchers of the operators, one file per operator.

Imported when an operator first takes its "triton" backend, never by `import goku_kernels`.
"""
