"""UCX by ucxx: reads and writes over tagged messages."""
