"""Which task is this: one gradient, and the rules around it."""
