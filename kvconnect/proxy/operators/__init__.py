"""What operators may order and see: engines that come and go, metrics, traces."""
