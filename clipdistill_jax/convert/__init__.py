"""Weights of other libraries in and out, one file a source; `rules` holds what the tables share."""
