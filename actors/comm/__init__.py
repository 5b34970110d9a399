"""Communication of one generation: process groups, point-to-point links, dispatch and combine."""
