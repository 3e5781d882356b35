"""capfilt: captioner and filter, pretrained in rounds on web pairs they have cleaned themselves.

Importing it does nothing else: no environment variable is set, no logging, no device looked for.
"""

from __future__ import annotations

from capfilt.errors import CapfiltError

__all__ = ["__version__", "CapfiltError"]

__version__ = "0.1.0"
