"""Speed records: scripts that say, top to bottom, how fast a target accuracy is reached."""
