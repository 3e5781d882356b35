"""The public Python API, which `import capfilt` offers: functions for the verbs, models and files in the hand.

The command line calls the same functions. What is heavy (torch, pyarrow, Ray) is imported inside of them.
"""
