"""What vLLM's P2pNcclConnector was: the connector, its options, ids that name engines, pings."""
