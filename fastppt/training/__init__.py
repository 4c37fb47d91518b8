"""One step, the engines that run it, and the loop over stages."""
