"""Records of tensors that methods lower to: how they are applied, folded and composed, and the sites where they act."""
