"""A run whose nodes come and go every half minute."""
