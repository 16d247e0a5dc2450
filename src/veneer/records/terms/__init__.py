"""Terms of a record at a linear layer, one file each: a pair, a change of the weight, a scale, a rotation.

Their counterparts in `ops.linear` compute the same for training (forward and backward) and serving.
"""
