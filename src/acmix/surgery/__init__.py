"""Networks changed after they are built: converted, started warm, fused for inference."""
