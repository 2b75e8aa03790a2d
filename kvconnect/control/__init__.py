"""The control channel between ranks: messages, their proof, and links of either direction."""
