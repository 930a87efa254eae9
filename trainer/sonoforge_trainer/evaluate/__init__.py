"""Evaluation of a checkpoint: one feature pass, frozen protocols, one result that is never made twice."""
