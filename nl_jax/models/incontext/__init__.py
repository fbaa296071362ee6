"""A language model whose levels learn while it reads."""
