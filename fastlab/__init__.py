"""fastlab: convert an image dataset once, train many small classifiers on it, fast."""

__version__ = "0.1.0"
