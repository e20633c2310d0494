"""What the commands do, without the command line: names and files in, files and facts out."""
