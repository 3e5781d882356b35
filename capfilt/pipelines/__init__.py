"""The stories, where the rooms meet. A verb of the command line is a module here."""
