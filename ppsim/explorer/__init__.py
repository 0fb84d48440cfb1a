"""Explorer: a page on this machine that shows what becomes of a step when its schedule or its costs change.

The server keeps nothing but the measured runs that it was given: every question of the page holds all that is needed
for its answer. `question` reads one, `picture` turns a step into what the page draws, `server` listens.
"""
