"""The ground: what every room may use. Errors, the host, files, texts, keys, tables, pictures."""
