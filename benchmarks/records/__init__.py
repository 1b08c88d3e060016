"""Speed records: each script states its recipe, and measures how fast it reaches an accuracy."""
