"""Flash-STU convolutional language models: filters, convolutions, FutureFill, model."""
