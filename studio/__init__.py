"""Delta Studio: the page, the store and the rules. Never imports torch."""

__version__ = "0.1.0"
