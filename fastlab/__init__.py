"""fastlab: convert an image dataset once, train many small classifiers on it, fast."""

from pathlib import Path

_VERSION = Path(__file__).with_name("version.txt")  # written by a build, so not in every checkout
__version__ = _VERSION.read_text().strip() if _VERSION.exists() else "0.1.0.dev0+unknown"
