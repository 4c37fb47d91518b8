"""Networks and loops of other trainers."""
