"""One task shipped: torch.export, ONNX, AOTInductor, and processes without this package."""
