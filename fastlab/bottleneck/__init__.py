"""What limits somebody's training: their loader, their step, or neither; and which stage costs most."""
