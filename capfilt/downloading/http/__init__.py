"""One request to a public host: where a name leads, what may be asked, how politely."""
