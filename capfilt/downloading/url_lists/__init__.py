"""Lists of URLs: the files they are made of, a reader for each format, and one type for each column."""
