"""The anchor's weight over a grid: what the subject gains, and what the model loses."""
