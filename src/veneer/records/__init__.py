"""Records that methods lower to, tensors only: applied, folded, composed, and the sites where they act."""
