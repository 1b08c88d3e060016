"""How images reach the device: one file an engine, one contract, one augmentation module."""
