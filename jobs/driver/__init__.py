"""A run seen from the process that began it, took it over, or only looks: connect, follow, show, sum up."""
