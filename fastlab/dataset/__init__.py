"""From original images to dataset directories."""
