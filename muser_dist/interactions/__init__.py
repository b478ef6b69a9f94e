"""From a log of who heard what to pairs of songs that listeners prefer together.

`log` says what a log's columns mean, `readers` reads it piece by piece, `split` holds interactions out, `mining` turns
interactions into pairs with functions of tables, `phases` runs those over files, and `job` runs the phases on Ray.
"""
