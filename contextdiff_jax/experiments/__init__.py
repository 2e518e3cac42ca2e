"""Plans of variants and seeds, their cells, and the tables made of them."""
