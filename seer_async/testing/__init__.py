"""Public test kit: the core under a virtual clock, with engines that fail on purpose."""
