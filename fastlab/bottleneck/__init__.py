"""What limits a user's training: the loader, the step, or neither; and which stage costs most."""
