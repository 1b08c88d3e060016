"""HTML pages about runs. They need no torch, so that a laptop without it can write them."""
