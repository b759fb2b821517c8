"""Linen modules and the records they return; needs JAX and Flax only."""
