"""Reading the text of sources: files, folders and their rows."""
