"""The public Python API, which `import capfilt` offers: the verbs as functions, loaded models, readers.

The command line calls the same functions. What is heavy (torch, pyarrow, Ray) is imported inside of them.
"""
