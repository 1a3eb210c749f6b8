"""What goes over the network: generated stubs, the codec, channels and the error interceptor."""
