"""What the command line does, without the command line: names and files in, files and facts out."""
