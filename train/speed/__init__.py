"""What a step costs: FLOPs, traces, ranges."""
