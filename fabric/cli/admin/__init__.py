"""What administrators can do, a file a noun, with the verbs add, show, modify and delete."""
