"""Every figure in the documents, from one command each."""
