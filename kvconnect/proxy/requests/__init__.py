"""A request on its way: its turn, the two legs, what they carry, and what became of it."""
