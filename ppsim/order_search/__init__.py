"""Search: the best order of F, B, I and W under an activation limit."""
