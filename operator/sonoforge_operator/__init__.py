"""The operator: decides what a PretrainJob needs next, for a cluster or for one machine."""
