"""What moves: sets of parameters that a stage trains."""
