"""What users can do, a file a command. Each file's command has the file's name."""
