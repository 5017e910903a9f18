"""The paper's two principles measured in models: adaptive routing and lateral inhibition, layer by layer."""
