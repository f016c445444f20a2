"""What a run takes: operations and bytes of a step, devices, and how a batch is spread over them."""
