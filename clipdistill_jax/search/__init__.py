"""Finding clips of a folder by text, with an exported model: an index of vectors, and queries to it."""
