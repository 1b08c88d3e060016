"""A page on this machine that shows what a run sees in pictures, and which images it gets wrong."""
