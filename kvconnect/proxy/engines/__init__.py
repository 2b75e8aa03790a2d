"""The engines of both roles: who is there and lives, whose turn it is, and how they are reached."""
