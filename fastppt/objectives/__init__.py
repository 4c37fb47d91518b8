"""What pulls, and what holds: one file a loss term, each reads like its equation."""
