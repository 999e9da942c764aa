"""Model families. models.families hands out a Family, the spec of one.

Nothing is imported here: whoever wants models.errors alone starts without JAX.
"""
