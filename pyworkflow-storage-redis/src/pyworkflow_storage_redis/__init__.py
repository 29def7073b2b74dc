"""Redis storage: the name is reserved, the code is not built yet.

Choosing it raises ``ConfigurationError``; nothing here pretends to work.
"""

__version__ = "0.1.0"
