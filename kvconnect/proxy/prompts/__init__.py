"""What engines hold of a prompt, and where it therefore belongs."""
